"""Laws of the four quantities of one noise level, and of the loss on them."""

import pytest
import torch

from sat_train.diffusion.loss import min_snr_weight, offset_noise, v_mse_per_sample
from sat_train.diffusion.parameterization import add_noise, eps_from_v, v_target, x0_from_v
from sat_train.diffusion.schedule import zero_snr_alpha_bar


def _latents(*, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x0, eps, v_error = (
        torch.randn(4, 3, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    alpha_bar = zero_snr_alpha_bar()[torch.tensor([0, 300, 700, 999])]
    return x0, eps, v_error, alpha_bar


def test_velocity_gives_back_the_latent_and_the_noise_at_every_level():
    x0, eps, _, alpha_bar = _latents()
    x_t = add_noise(x0, eps, alpha_bar)
    v = v_target(x0, eps, alpha_bar)
    # two roundings to fp32 of numbers of size 1
    torch.testing.assert_close(x0_from_v(x_t, v, alpha_bar), x0, atol=2e-6, rtol=0)
    torch.testing.assert_close(eps_from_v(x_t, v, alpha_bar), eps, atol=2e-6, rtol=0)


def test_the_last_timestep_is_pure_noise_and_its_velocity_is_the_latent():
    x0, eps, _, _ = _latents()
    last = zero_snr_alpha_bar()[-1]
    assert torch.equal(add_noise(x0, eps, last), eps)
    assert torch.equal(v_target(x0, eps, last), -x0)


def test_noise_keeps_unit_variance():
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 1, 200_000, generator=generator).unbind()
    for alpha_bar in zero_snr_alpha_bar()[::250]:
        # standard error of a variance over 2e5 samples is 0.003
        assert add_noise(x0, eps, alpha_bar).var().item() == pytest.approx(1.0, abs=0.02)


def test_v_mse_is_cogvideos_weighted_x0_loss():
    x0, eps, v_error, alpha_bar = _latents(dtype=torch.float64)
    x_t = add_noise(x0, eps, alpha_bar)
    v_pred = v_target(x0, eps, alpha_bar) + v_error
    x0_pred = x0_from_v(x_t, v_pred, alpha_bar)
    weighted = ((x0_pred - x0) ** 2).flatten(1).mean(1) / (1 - alpha_bar)
    loss_b = v_mse_per_sample(v_pred, v_target(x0, eps, alpha_bar))
    assert loss_b.dtype == torch.float32
    torch.testing.assert_close(loss_b.double(), weighted, rtol=1e-6, atol=0)  # fp32 against fp64


def test_v_mse_of_half_precision_is_taken_in_fp32():
    v_pred = torch.full((1, 1, 1, 300, 300), 3e2, dtype=torch.float16)
    # the squares, 9e4, are beyond fp16
    assert v_mse_per_sample(v_pred, torch.zeros_like(v_pred)).item() == pytest.approx(9e4)


def test_min_snr_caps_the_x0_weight_and_keeps_pure_noise_in_the_loss():
    alpha_bar = zero_snr_alpha_bar()
    weight = min_snr_weight(alpha_bar, 5.0).double()
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(weight * (snr + 1), (snr + 1).clamp(max=5.0), rtol=1e-6, atol=0)
    assert weight[-1] == 1.0
    assert weight.dtype == torch.float64
    assert bool((weight[1:] >= weight[:-1]).all())


def test_offset_noise_moves_each_sample_as_one():
    eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    moved = offset_noise(eps, torch.tensor([1.0, -2.0]), 0.1)
    torch.testing.assert_close(moved - eps, torch.tensor([0.1, -0.2])[:, None, None].expand(2, 3, 4))
    assert torch.equal(offset_noise(eps, torch.tensor([1.0, -2.0]), 0.0), eps)
