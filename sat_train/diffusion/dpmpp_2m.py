"""DPM-Solver++ of second order, in its stochastic form: the sampler of the released models."""

from __future__ import annotations

import torch
from torch import Tensor

from sat_train.config.parts.sampler_parts import SamplerParams
from sat_train.diffusion.parameterization import x0_from_v
from sat_train.diffusion.samplers import Denoise, DrawNoise, OnStep, Sampler
from sat_train.diffusion.timesteps import Spacing, sampling_timesteps


def sample_dpmpp_2m(
    denoise: Denoise,
    draw_noise: DrawNoise,
    *,
    alpha_bar: Tensor,
    steps: int,
    spacing: Spacing = "trailing",
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples with second-order multistep DPM-Solver++, in its stochastic form (VPSDE).

    With `lambda = log(sqrt(alpha_bar / (1 - alpha_bar)))`, `h` its growth over this step and `h_last` over
    the step before, the update needs `exp(-2h)`, written here as a ratio of SNRs because `h` is infinite in
    the first and last step.

    Args:
        denoise: (latent, timestep) -> predicted v, of the latent's shape.
        draw_noise: Returns unit normal noise of the latent's shape. Called once before the first step, once
            in it, and twice in each later step except the last, where the second draw is used. CogVideoX's
            own samplers do the same, so one seed gives the same video in both.
        alpha_bar: Schedule, shape (num_timesteps,).
        steps: Number of network evaluations.
        spacing: Which timesteps are visited.
        on_step: Called with (index of the finished step, steps).

    Returns:
        Clean latent.

    Source: Lu et al. 2022 (arXiv:2211.01095) SDE-DPM-Solver++(2M); zai-org/CogVideo@7a1af71
    VPSDEDPMPP2MSampler; diffusers 0.42 `CogVideoXDPMScheduler`.
    """
    alpha_bar = alpha_bar.cpu()
    log_snr_half = torch.logit(alpha_bar) / 2
    latent, x0_last, timestep_last = draw_noise(), None, 0
    for index, (timestep, reached) in enumerate(sampling_timesteps(steps, len(alpha_bar), spacing)):
        now = alpha_bar[timestep]
        x0 = x0_from_v(latent, denoise(latent, timestep), now)
        if reached is None:
            latent = x0
        else:
            then = alpha_bar[reached]
            snr_ratio = now * (1 - then) / ((1 - now) * then)  # exp(-2h)
            noise, estimate = draw_noise(), x0
            if x0_last is not None:
                h = log_snr_half[reached] - log_snr_half[timestep]
                h_last = log_snr_half[timestep] - log_snr_half[timestep_last]
                noise, estimate = draw_noise(), x0 + h / (2 * h_last) * (x0 - x0_last)
            noise_kept = ((1 - then) / (1 - now) * snr_ratio).sqrt()
            noise_new = ((1 - then) * (1 - snr_ratio)).sqrt()
            latent = noise_kept * latent + then.sqrt() * (1 - snr_ratio) * estimate + noise_new * noise
        x0_last, timestep_last = x0, timestep
        if on_step is not None:
            on_step(index, steps)
    return latent


def build(params: SamplerParams) -> Sampler:
    """Builds the sampler, which has no settings of its own."""
    return sample_dpmpp_2m
