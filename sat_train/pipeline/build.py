"""Sections `model` and `args` -> pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sat_train.config import ModelSpec, RunConfig
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
    spec, model, args = config.spec, config.model, config.args
    return VideoDiffusion(
        dit=dit,
        vae=vae,
        text_encoder=text_encoder,
        alpha_bar=build_alpha_bar(spec),
        scale_factor=spec.latent_scale,
        image_latent_scale=spec.image_latent_scale,
        noised_image_input=model.noised_image_input,
        noised_image_dropout=model.noised_image_dropout,
        caption_dropout=spec.caption_dropout,
        null_condition=model.null_condition,
        null_text_ld=null_text_ld,
        posterior_sampling=spec.posterior_sampling,
        offset_noise_level=spec.offset_noise_level,
        min_snr_gamma=spec.min_snr_gamma,
        timestep_sampling=spec.timestep_sampling,
        temporal_compression=spec.temporal_compression,
        ofs=None if spec.ofs_width is None else _OFS,
        seed=args.seed,
        dtype=compute_dtype(args),
        device=next(dit.parameters()).device,
        load_encoders=load_encoders,
    )


def build_alpha_bar(spec: ModelSpec) -> Tensor:
    """Returns the noise schedule of the denoiser, which is that of training and sampling too."""
    params = spec.schedule
    return zero_snr_alpha_bar(
        params.num_timesteps,
        params.shift_scale,
        beta_start=params.linear_start,
        beta_end=params.linear_end,
        keep_start=params.keep_start,
        post_shift=params.post_shift,
    )
