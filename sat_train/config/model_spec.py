"""All numbers of a model in one flat record: the only reader of CogVideo's nested `model` section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sat_train.config.geometry import Geometry
from sat_train.config.network_spec import NetworkSpec
from sat_train.config.parts.adapter_parts import AdapterConfig
from sat_train.config.parts.guidance_parts import GuidanceConfig
from sat_train.config.parts.loss_term_parts import LossTermConfig
from sat_train.config.parts.module_parts import ModuleConfig
from sat_train.config.parts.noise_parts import NoiseConfig
from sat_train.config.parts.noise_schedule import ZeroSNRDDPMDiscretizationParams
from sat_train.config.parts.position_parts import TimeHeightWidth
from sat_train.config.parts.sampler_parts import SamplerConfig
from sat_train.config.parts.timestep_parts import TimestepsConfig
from sat_train.config.schema.encoder_slots import T5TextEncoderParams, VideoCoderParams, VideoVAESettings
from sat_train.config.schema.model_section import ModelConfig
from sat_train.config.schema.network import DiffusionTransformerParams

_TRAINED_FPS = {"1.0": 8, "1.5": 16}


@dataclass(frozen=True, kw_only=True)
class ModelSpec(NetworkSpec):
    """One member of the CogVideoX family.

    Args:
        trained_frames: Pixel frames of pre-training.
        text: Folder of the text encoder, and tokens of a caption.
        coder: Numbers of the video autoencoder, shared by both halves.
        vae: Its weights, chunks and tiles.
        schedule: The noise schedule.
        sampler: The sampler.
        sampling_steps: Its denoising steps.
        guidance: Its classifier-free guidance.
        adapter: Adapters; None trains the weights themselves.
        modules: Further network modules, by name.
        hook_order: By hook, names of the modules around it, outermost first.
        conditions: Names of the inputs of the model besides noise and time: text, image, those of extensions.
        condition_widths: By condition, channels of the tensor that it gives modules; 0 if not known.
        latent_scale: Latents are multiplied by this before the transformer sees them.
        image_latent_scale: Factor on the latent of the image condition.
        caption_dropout: Share of captions dropped in training.
        posterior_sampling: Training draws latents from the posterior; False uses its mean.
        offset_noise_level: Standard deviation of the noise that all elements of a sample share.
        min_snr_gamma: Largest weight of the x0 error; None for no limit.
        timesteps: Distribution of the training timesteps.
        noise: Distribution of the noise.
        loss_terms: Terms of the training loss, by name; `diffusion` has weight 1 where it is not named.
    """

    trained_frames: int
    text: T5TextEncoderParams
    coder: VideoCoderParams
    vae: VideoVAESettings
    schedule: ZeroSNRDDPMDiscretizationParams
    sampler: SamplerConfig
    sampling_steps: int
    guidance: GuidanceConfig
    adapter: AdapterConfig | None
    modules: Mapping[str, ModuleConfig]
    hook_order: Mapping[str, tuple[str, ...]]
    conditions: tuple[str, ...]
    condition_widths: Mapping[str, int]
    latent_scale: float
    image_latent_scale: float
    caption_dropout: float
    posterior_sampling: bool
    offset_noise_level: float
    min_snr_gamma: float | None
    timesteps: TimestepsConfig
    noise: NoiseConfig
    loss_terms: Mapping[str, LossTermConfig]

    @property
    def takes_first_frames(self) -> bool:
        """True where a video is sampled from its first frame or frames."""
        return "image" in self.conditions or self.timesteps.params.has_levels

    @property
    def trained_fps(self) -> int:
        """Frame rate of the released weights."""
        return _TRAINED_FPS[self.family]


def build_model_spec(model: ModelConfig) -> ModelSpec:
    """Builds the spec of a model from its section, whose values may still contradict each other."""
    network, sampler = model.network_config.params, model.sampler_config.params
    conditioner, first_stage = model.conditioner_config.params.emb_models[0], model.first_stage_config.params
    loss, coder = model.loss_fn_config.params, first_stage.encoder_config.params
    coder = coder.model_copy(update={"out_ch": first_stage.decoder_config.params.out_ch})
    geometry = Geometry(
        patch=network.patch_size,
        temporal_compression=coder.temporal_compress_times,
        spatial_compression=1 << (len(coder.ch_mult) - 1),
    )
    spec = ModelSpec(
        patch=geometry.patch,
        temporal_compression=geometry.temporal_compression,
        spatial_compression=geometry.spatial_compression,
        layers=network.num_layers,
        width=network.hidden_size,
        heads=network.num_attention_heads,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        time_width=network.time_embed_dim or network.hidden_size,
        ofs_width=network.ofs_embed_dim,
        qk_norm=network.modules.adaln_layer_config.params.qk_ln,
        affine_norms=network.elementwise_affine,
        trained_frames=network.num_frames,
        text=conditioner.params,
        text_width=network.modules.patch_embed_config.params.text_hidden_size,
        positions=network.modules.pos_embed_config,
        trained_latent=(
            geometry.latent_frames(network.num_frames),
            network.latent_height,
            network.latent_width,
        ),
        interpolation=_interpolation(network),
        coder=coder,
        vae=first_stage,
        schedule=model.denoiser_config.params.discretization_config.params,
        sampler=model.sampler_config,
        sampling_steps=sampler.num_steps,
        guidance=sampler.guider_config,
        adapter=network.modules.lora_config,
        modules=model.modules,
        hook_order=model.hook_order,
        conditions=("text", *("image",) * model.noised_image_input, *model.conditions),
        condition_widths={},
        latent_scale=model.scale_factor,
        image_latent_scale=model.image_latent_scale or model.scale_factor,
        caption_dropout=conditioner.ucg_rate,
        posterior_sampling=first_stage.regularizer_config.params.sample,
        offset_noise_level=loss.offset_noise_level,
        min_snr_gamma=loss.min_snr_value,
        timesteps=loss.sigma_sampler_config,
        noise=loss.noise_config,
        loss_terms=model.loss_terms,
    )
    return _with_conditions(spec, model)


def _with_conditions(spec: ModelSpec, model: ModelConfig) -> ModelSpec:
    """Adds the channels that conditions append to the input."""
    own = {name: condition.params for name, condition in model.conditions.items()}
    channels = {name: params.channels(spec) for name, params in own.items()}
    appended = sum(channels.values())
    return replace(
        spec,
        in_channels=spec.in_channels + appended,
        condition_channels=appended,
        condition_widths={name: 0 if channels[name] else own[name].width(spec) for name in own},
    )


def _interpolation(network: DiffusionTransformerParams) -> TimeHeightWidth:
    """CogVideo's files have interpolation in one of two places; together they multiply."""
    t, h, w = network.modules.pos_embed_config.params.interpolation
    return network.time_interpolation * t, network.height_interpolation * h, network.width_interpolation * w
