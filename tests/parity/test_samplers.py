"""Whole sampler runs against diffusers' schedulers, on a velocity field that is no straight line."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.diffusion.schedule import zero_snr_alpha_bar

# every count divides 1000, where diffusers' stride meets its own timesteps
STEPS = [2, 10, 50]
SHAPE = (2, 3, 4, 5, 6)


def _denoise(latent: torch.Tensor, timestep: int) -> torch.Tensor:
    return torch.sin(2.0 * latent + timestep / 300.0) - 0.3 * latent


def _scheduler(cls, shift_scale, spacing):
    return cls(
        snr_shift_scale=shift_scale,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
    )


def _noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_equals_diffusers(steps, shift_scale, spacing):
    scheduler = _scheduler(CogVideoXDDIMScheduler, shift_scale, spacing)
    scheduler.set_timesteps(steps)
    theirs = _noise()
    for timestep in scheduler.timesteps:
        v = _denoise(theirs, int(timestep))
        theirs = scheduler.step(v, timestep, theirs, return_dict=False)[0]
    ours = sample_ddim(
        _denoise, _noise, alpha_bar=zero_snr_alpha_bar(1000, shift_scale), steps=steps, spacing=spacing
    )
    # fp32 rounding, grown by a field whose slope is about 2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_draws_the_same_noise_and_takes_the_same_path(steps, shift_scale, spacing):
    scheduler = _scheduler(CogVideoXDPMScheduler, shift_scale, spacing)
    scheduler.set_timesteps(steps)
    x0_last, generator = None, torch.Generator().manual_seed(1)
    theirs = torch.randn(SHAPE, generator=generator)
    for index, timestep in enumerate(scheduler.timesteps):
        back = scheduler.timesteps[index - 1] if index else None
        v = _denoise(theirs, int(timestep))
        theirs, x0_last = scheduler.step(
            v, x0_last, timestep, back, theirs, generator=generator, return_dict=False
        )
    generator = torch.Generator().manual_seed(1)
    ours = sample_dpmpp_2m(
        _denoise,
        lambda: torch.randn(SHAPE, generator=generator),
        alpha_bar=zero_snr_alpha_bar(1000, shift_scale),
        steps=steps,
        spacing=spacing,
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
