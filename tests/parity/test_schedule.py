"""The noise schedule against diffusers' CogVideoX schedulers."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from sat_train.diffusion.parameterization import add_noise, v_target
from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.diffusion.timesteps import sampling_timesteps

RELEASED = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": False}


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("shift_scale", [1.0, 3.0])
def test_alpha_bar_at_all_timesteps(scheduler, shift_scale):
    theirs = scheduler(snr_shift_scale=shift_scale, **RELEASED).alphas_cumprod
    ours = zero_snr_alpha_bar(1000, shift_scale)
    assert ours.dtype == torch.float64
    assert ours[-1] == 0.0
    # the same float64 operations in another order
    torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=1e-13)


def test_noising_and_velocity_at_all_timesteps():
    theirs = CogVideoXDPMScheduler(snr_shift_scale=3.0, **RELEASED)
    x0, eps = torch.randn(2, 1000, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(1000)
    alpha_bar = zero_snr_alpha_bar(1000, 3.0)[timesteps]
    # they round alpha_bar itself to fp32, and 1 - alpha_bar loses three digits near timestep 0
    torch.testing.assert_close(
        add_noise(x0, eps, alpha_bar), theirs.add_noise(x0, eps, timesteps), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        v_target(x0, eps, alpha_bar), theirs.get_velocity(x0, eps, timesteps), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 30, 50, 77, 100, 250, 1000])
def test_sampling_timesteps(spacing, steps):
    theirs = CogVideoXDDIMScheduler(timestep_spacing=spacing, **RELEASED)
    theirs.set_timesteps(steps)
    ours = [timestep for timestep, _ in sampling_timesteps(steps, spacing=spacing)]
    assert ours == theirs.timesteps.tolist()
