"""Laws of the samplers on distributions whose velocity is known exactly."""

import pytest
import torch

from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.diffusion.schedule import zero_snr_alpha_bar

ALPHA_BAR = zero_snr_alpha_bar()


def _velocity_to(x0: torch.Tensor):
    """The exact velocity when the data is one point."""

    def denoise(latent, timestep):
        alpha, sigma = ALPHA_BAR[timestep].sqrt(), (1 - ALPHA_BAR[timestep]).sqrt()
        eps = (latent - alpha * x0) / sigma
        return alpha * eps - sigma * x0

    return denoise


def _velocity_of_normal(mean: float, std: float):
    """The exact velocity when the data is normal: E[x0 | x_t] and E[eps | x_t] are linear in x_t."""

    def denoise(latent, timestep):
        alpha, sigma = ALPHA_BAR[timestep].sqrt(), (1 - ALPHA_BAR[timestep]).sqrt()
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (latent - alpha * mean)
        eps = (latent - alpha * x0) / sigma
        return alpha * eps - sigma * x0

    return denoise


def _run(name, denoise, latent, steps, **options):
    generator = torch.Generator().manual_seed(7)
    drawn = [latent]

    def draw_noise():
        drawn.append(torch.randn(latent.shape, generator=generator, dtype=latent.dtype))
        return drawn[-2]

    sample = {"ddim": sample_ddim, "dpmpp_2m": sample_dpmpp_2m}[name]
    return sample(denoise, draw_noise, alpha_bar=ALPHA_BAR, steps=steps, **options)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_one_point_of_data_is_reached_from_any_noise(name, steps, spacing):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 2, 4, 3, 3, generator=generator)
    reached = _run(name, _velocity_to(x0), noise, steps, spacing=spacing)
    assert reached.dtype == torch.float32
    torch.testing.assert_close(reached, x0, atol=1e-4, rtol=0)  # fp32 noise divided by the last sigma, 0.03


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_a_normal_distribution_is_sampled_with_its_mean_and_spread(name):
    noise = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = _run(name, _velocity_of_normal(0.5, 0.8), noise, 200)
    # standard error 0.004; the rest is the discretisation at 200 steps
    assert samples.mean().item() == pytest.approx(0.5, abs=0.02)
    assert samples.std().item() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_progress_is_reported_once_a_step(name):
    seen = []
    noise = torch.zeros(1, 1, 1, 1, 1)
    _run(name, _velocity_to(noise), noise, 4, on_step=lambda index, steps: seen.append((index, steps)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
