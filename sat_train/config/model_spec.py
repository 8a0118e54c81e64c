"""All numbers of a model in one flat record: the only reader of CogVideo's nested `model` section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sat_train.config.latent_geometry import Geometry, LatentShape
from sat_train.config.schema.diffusion import (
    ConstantGuidanceParams,
    DynamicGuidanceParams,
    ZeroSNRDDPMDiscretizationParams,
)
from sat_train.config.schema.encoder_slots import T5TextEncoderParams, VideoCoderParams, VideoVAESettings
from sat_train.config.schema.model_section import ModelConfig
from sat_train.config.schema.network import (
    DiffusionTransformerParams,
    LoraParams,
    Rotary3DPositionEmbeddingParams,
    SizePolicy,
)

PositionKind = Literal["sincos", "rotary", "rotary_learned"]
_TRAINED_FPS = {"1.0": 8, "1.5": 16}
_TRAINED_COMPRESSION = 4  # pixel frames in one latent frame, of all released weights


@dataclass(frozen=True)
class PositionSpec:
    """The position embedding, and the size it is made for.

    Args:
        kind: `sincos` (2B), `rotary` (5B, 1.5) or `rotary_learned` (5B-I2V).
        frames: Pixel frames.
        latent_size: Latent frames, height and width.
        text_length: Text tokens that tables leave room for.
        interpolation: Positions along time, height and width are divided by these.
        theta: Base of the rotary frequencies.
        size_policy: What a table does at other sizes.
    """

    kind: PositionKind
    frames: int
    latent_size: tuple[int, int, int]
    text_length: int
    interpolation: tuple[float, float, float]
    theta: float
    size_policy: SizePolicy

    @property
    def is_table(self) -> bool:
        """Other sizes need another table, not only other angles."""
        return self.kind != "rotary"


class Flops(NamedTuple):
    """Floating-point operations of a forward pass; a multiply-add is two.

    The backward pass through weights that train takes twice `linear` and twice `attention`; frozen weights
    take `linear` once, and `attention` still twice.
    """

    linear: int
    attention: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Geometry):
    """One member of the CogVideoX family.

    Args:
        layers: Transformer layers.
        width: Model width.
        heads: Attention heads.
        in_channels: Channels of the latent, plus those of the image condition.
        out_channels: Channels of the prediction.
        time_width: Width of the time features.
        ofs_width: Width of the `ofs` features (1.5 image-to-video); None without.
        qk_norm: Queries and keys are normalised.
        affine_norms: Layer norms have a weight and a bias.
        text: Folder of the text encoder, and tokens of a caption.
        text_width: Width of a text embedding.
        positions: The position embedding.
        coder: Numbers of the video autoencoder; they are those of both halves.
        vae: Its weights, chunks and tiles.
        schedule: The noise schedule.
        sampler: Which sampler.
        sampling_steps: Its denoising steps.
        guidance: Its classifier-free guidance.
        lora: Adapters; None trains the weights themselves.
        conditions: What the model is given besides noise and time.
        latent_scale: Latents are multiplied by this before the transformer sees them.
        image_latent_scale: Factor on the latent of the image condition.
        caption_dropout: Share of captions dropped in training.
        posterior_sampling: Training draws latents from the posterior; False takes its mean.
        offset_noise_level: Standard deviation of the noise that all elements of a sample share.
        min_snr_gamma: Largest weight of the x0 error; None for no limit.
        timestep_sampling: `stratified` spreads the timesteps of a step over the schedule.
    """

    layers: int
    width: int
    heads: int
    in_channels: int
    out_channels: int
    time_width: int
    ofs_width: int | None
    qk_norm: bool
    affine_norms: bool
    text: T5TextEncoderParams
    text_width: int
    positions: PositionSpec
    coder: VideoCoderParams
    vae: VideoVAESettings
    schedule: ZeroSNRDDPMDiscretizationParams
    sampler: Literal["DDIM", "DPMPP2M"]
    sampling_steps: int
    guidance: ConstantGuidanceParams | DynamicGuidanceParams
    lora: LoraParams | None
    conditions: tuple[str, ...]
    latent_scale: float
    image_latent_scale: float
    caption_dropout: float
    posterior_sampling: bool
    offset_noise_level: float
    min_snr_gamma: float | None
    timestep_sampling: Literal["uniform", "stratified"]

    @property
    def family(self) -> Literal["1.0", "1.5"]:
        """CogVideoX 1.5 has patches of several frames."""
        return "1.0" if self.patch[0] == 1 else "1.5"

    @property
    def trained_fps(self) -> int:
        """Frame rate of the released weights."""
        return _TRAINED_FPS[self.family]

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    def tokens(self, latent: LatentShape) -> int:
        """Returns the tokens of one sample, text included: what memory and time grow with."""
        return self.patches(latent) + self.text.max_length

    def linear_layers(self) -> tuple[str, ...]:
        """Returns the names of the transformer's linear layers, which adapters may be given to."""
        inside = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        blocks = [f"transformer.layers.{layer}.{name}" for layer in range(self.layers) for name in inside]
        modulations = [f"mixins.adaln_layer.adaLN_modulations.{layer}.1" for layer in range(self.layers)]
        around = ["time_embed.0", "time_embed.2", "mixins.patch_embed.text_proj", "mixins.final_layer.linear"]
        ofs = [] if self.ofs_width is None else ["ofs_embed.0", "ofs_embed.2"]
        return (*blocks, *modulations, *around, "mixins.final_layer.adaLN_modulation.1", *ofs)

    def parameters(self) -> dict[str, int]:
        """Returns the numbers of weights of the transformer by part, without adapters."""
        d, e, patch = self.width, self.time_width, math.prod(self.patch)
        norm = 2 * d * self.affine_norms
        qk_norm = 4 * self.head_width * self.affine_norms * self.qk_norm
        table = math.prod(
            size // side for size, side in zip(self.positions.latent_size, self.patch, strict=True)
        )
        parts = {
            "transformer.layers": self.layers * (12 * d * d + 9 * d + 2 * norm),
            "transformer.final_layernorm": norm,
            "time_embed": d * e + e + e * e + e,
            "ofs_embed": 0 if self.ofs_width is None else 2 * (e * e + e),
            "mixins.pos_embed": (self.positions.text_length + table) * d
            if self.positions.kind == "rotary_learned"
            else 0,
            "mixins.patch_embed": (self.in_channels * patch + self.text_width + 2) * d,
            "mixins.adaln_layer": self.layers * (12 * d * (e + 1) + qk_norm),
            "mixins.final_layer": norm + (d + 1) * patch * self.out_channels + 2 * d * (e + 1),
        }
        return {part: count for part, count in parts.items() if count}

    def flops(self, tokens: int) -> Flops:
        """Returns what the transformer's forward pass of one sample takes.

        Args:
            tokens: Of the sample, text included.
        """
        d, e = self.width, self.time_width
        video, text = tokens - self.text.max_length, self.text.max_length
        projections = video * math.prod(self.patch) * (self.in_channels + self.out_channels)
        once = d * e + e * e + 2 * d * e + 12 * d * e * self.layers + (self.ofs_width is not None) * 2 * e * e
        blocks = 12 * d * d * tokens * self.layers
        return Flops(
            linear=2 * (blocks + (projections + text * self.text_width) * d + once),
            attention=4 * tokens**2 * d * self.layers,
        )


def build_model_spec(model: ModelConfig) -> ModelSpec:
    """Reads the numbers of a model from its section, whose values may still contradict each other."""
    network, sampler = model.network_config.params, model.sampler_config.params
    conditioner, first_stage = model.conditioner_config.params.emb_models[0], model.first_stage_config.params
    loss, coder = model.loss_fn_config.params, first_stage.encoder_config.params
    return ModelSpec(
        patch=network.patch_size,
        temporal_compression=coder.temporal_compress_times,
        spatial_compression=1 << (len(coder.ch_mult) - 1),
        layers=network.num_layers,
        width=network.hidden_size,
        heads=network.num_attention_heads,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        time_width=network.time_embed_dim or network.hidden_size,
        ofs_width=network.ofs_embed_dim,
        qk_norm=network.modules.adaln_layer_config.params.qk_ln,
        affine_norms=network.elementwise_affine,
        text=conditioner.params,
        text_width=network.modules.patch_embed_config.params.text_hidden_size,
        positions=_positions(network),
        coder=coder,
        vae=first_stage,
        schedule=model.denoiser_config.params.discretization_config.params,
        sampler=model.sampler_config.target,
        sampling_steps=sampler.num_steps,
        guidance=sampler.guider_config.params,
        lora=None if network.modules.lora_config is None else network.modules.lora_config.params,
        conditions=("text", "image") if model.noised_image_input else ("text",),
        latent_scale=model.scale_factor,
        image_latent_scale=model.image_latent_scale or model.scale_factor,
        caption_dropout=conditioner.ucg_rate,
        posterior_sampling=first_stage.regularizer_config.params.sample,
        offset_noise_level=loss.offset_noise_level,
        min_snr_gamma=loss.min_snr_value,
        timestep_sampling="stratified" if loss.sigma_sampler_config.params.uniform_sampling else "uniform",
    )


def _positions(network: DiffusionTransformerParams) -> PositionSpec:
    own = network.modules.pos_embed_config.params
    rotary = own if isinstance(own, Rotary3DPositionEmbeddingParams) else None
    kind: PositionKind = "sincos"
    if rotary is not None:
        kind = "rotary_learned" if rotary.learnable_pos_embed else "rotary"
    # CogVideo's files have interpolation in one of two places; together they multiply.
    names = ("time_interpolation", "height_interpolation", "width_interpolation")
    t, h, w = (getattr(network, name) * getattr(own, name, 1.0) for name in names)
    frames = (network.num_frames - 1) // _TRAINED_COMPRESSION + 1
    return PositionSpec(
        kind=kind,
        frames=network.num_frames,
        latent_size=(frames, network.latent_height, network.latent_width),
        text_length=own.text_length,
        interpolation=(t, h, w),
        theta=10000.0 if rotary is None else rotary.theta,
        size_policy=own.size_policy,
    )
