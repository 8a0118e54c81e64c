"""Sections `model` and `args` -> pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sat_train.config import ModelSpec, RunConfig
from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.encoding.build import build_conditions
from sat_train.models.build import compute_dtype
from sat_train.models.encoders import Encoders
from sat_train.objective.loss_term import WeightedTerm
from sat_train.objective.video_diffusion import VideoDiffusion

if TYPE_CHECKING:
    from sat_train.models.dit.transformer import DiffusionTransformer


def build_pipeline(config: RunConfig, *, dit: DiffusionTransformer, encoders: Encoders) -> VideoDiffusion:
    """Builds the pipeline around a transformer that is on its device already; encoders are moved there."""
    spec, args = config.spec, config.args
    timestep_law = spec.timesteps.build()
    has_levels = spec.timesteps.params.has_levels
    assert has_levels == hasattr(timestep_law, "levels"), "a law's record says whether it has levels"
    return VideoDiffusion(
        dit=dit,
        encoders=encoders,
        conditions=build_conditions(config, encoders),
        alpha_bar=build_alpha_bar(spec),
        scale_factor=spec.latent_scale,
        posterior_sampling=spec.posterior_sampling,
        offset_noise_level=spec.offset_noise_level,
        min_snr_gamma=spec.min_snr_gamma,
        loss_terms=build_loss_terms(spec),
        timestep_law=timestep_law,
        noise_law=spec.noise.build(spec),
        stratified=spec.timesteps.params.uniform_sampling,
        seed=args.seed,
        dtype=compute_dtype(args),
        device=next(dit.parameters()).device,
    )


def build_loss_terms(spec: ModelSpec) -> dict[str, WeightedTerm]:
    """Builds the terms of the loss that the configuration names."""
    return {
        name: WeightedTerm(choice.build(spec), choice.weight, choice.params.needs_reference)
        for name, choice in spec.loss_terms.items()
    }


def build_alpha_bar(spec: ModelSpec) -> Tensor:
    """Returns the noise schedule of the denoiser, which training and sampling share."""
    params = spec.schedule
    return zero_snr_alpha_bar(
        params.num_timesteps,
        params.shift_scale,
        beta_start=params.linear_start,
        beta_end=params.linear_end,
        keep_start=params.keep_start,
        post_shift=params.post_shift,
    )
