"""DDIM without noise."""

from __future__ import annotations

from torch import Tensor

from sat_train.config.parts.sampler_parts import SamplerParams
from sat_train.diffusion.parameterization import x0_from_v
from sat_train.diffusion.samplers import Denoise, DrawNoise, OnStep, Sampler
from sat_train.diffusion.timesteps import Spacing, sampling_timesteps


def sample_ddim(
    denoise: Denoise,
    draw_noise: DrawNoise,
    *,
    alpha_bar: Tensor,
    steps: int,
    spacing: Spacing = "trailing",
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples with deterministic DDIM.

    Args:
        denoise: (latent, timestep) -> predicted v, of the latent's shape.
        draw_noise: Returns unit normal noise of the latent's shape. Called once.
        alpha_bar: Schedule, shape (num_timesteps,).
        steps: Number of network evaluations.
        spacing: Which timesteps are visited.
        on_step: Called with (index of the finished step, steps).

    Returns:
        Clean latent.

    Source: Song et al. 2021 (arXiv:2010.02502) equation 12 with eta 0; diffusers 0.42
    `CogVideoXDDIMScheduler`.
    """
    alpha_bar = alpha_bar.cpu()
    clean = alpha_bar.new_ones(())
    latent = draw_noise()
    for index, (timestep, reached) in enumerate(sampling_timesteps(steps, len(alpha_bar), spacing)):
        now = alpha_bar[timestep]
        then = clean if reached is None else alpha_bar[reached]
        x0 = x0_from_v(latent, denoise(latent, timestep), now)
        noise_kept = ((1 - then) / (1 - now)).sqrt()
        latent = noise_kept * latent + (then.sqrt() - now.sqrt() * noise_kept) * x0
        if on_step is not None:
            on_step(index, steps)
    return latent


def build(params: SamplerParams) -> Sampler:
    """Builds the sampler, which has no settings of its own."""
    return sample_ddim
