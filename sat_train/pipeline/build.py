"""Sections `model` and `args` -> pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sat_train.config import ModelConfig, RunConfig
from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.models.build import compute_dtype
from sat_train.pipeline.video_diffusion import VideoDiffusion

if TYPE_CHECKING:
    from sat_train.encoding.encoders import LoadEncoders
    from sat_train.models.dit.transformer import DiffusionTransformer
    from sat_train.models.text.t5 import T5TextEncoder
    from sat_train.models.vae.video_vae import VideoVAE

# what diffusers' pipeline and CogVideo's sampling give to CogVideoX1.5-I2V
_OFS = 2.0


def build_pipeline(
    config: RunConfig,
    *,
    dit: DiffusionTransformer,
    vae: VideoVAE | None,
    text_encoder: T5TextEncoder | None,
    null_text_ld: Tensor | None = None,
    load_encoders: LoadEncoders | None = None,
) -> VideoDiffusion:
    """Builds the pipeline around models that are on their device already.

    Args:
        config: The configuration.
        dit: The transformer.
        vae: Frozen video autoencoder; None for a run from the cache that draws no samples.
        text_encoder: Frozen text encoder; None likewise.
        null_text_ld: The encoded empty prompt, where there is no text encoder to make it.
        load_encoders: Loads both encoders where a batch needs them after all.
    """
    model, args = config.model, config.args
    loss, conditioner = model.loss_fn_config.params, model.conditioner_config.params.emb_models[0]
    is_stratified = loss.sigma_sampler_config.params.uniform_sampling
    return VideoDiffusion(
        dit=dit,
        vae=vae,
        text_encoder=text_encoder,
        alpha_bar=build_alpha_bar(model),
        scale_factor=model.scale_factor,
        image_latent_scale=model.image_latent_scale or model.scale_factor,
        noised_image_input=model.noised_image_input,
        noised_image_dropout=model.noised_image_dropout,
        caption_dropout=conditioner.ucg_rate,
        null_condition=model.null_condition,
        null_text_ld=null_text_ld,
        posterior_sampling=model.first_stage_config.params.regularizer_config.params.sample,
        offset_noise_level=loss.offset_noise_level,
        min_snr_gamma=loss.min_snr_value,
        timestep_sampling="stratified" if is_stratified else "uniform",
        temporal_compression=model.first_stage_config.params.encoder_config.params.temporal_compress_times,
        ofs=None if model.network_config.params.ofs_embed_dim is None else _OFS,
        seed=args.seed,
        dtype=compute_dtype(args),
        device=next(dit.parameters()).device,
        load_encoders=load_encoders,
    )


def build_alpha_bar(model: ModelConfig) -> Tensor:
    """Returns the noise schedule of the denoiser, which is that of training and sampling too."""
    params = model.denoiser_config.params.discretization_config.params
    return zero_snr_alpha_bar(
        params.num_timesteps,
        params.shift_scale,
        beta_start=params.linear_start,
        beta_end=params.linear_end,
        keep_start=params.keep_start,
        post_shift=params.post_shift,
    )
