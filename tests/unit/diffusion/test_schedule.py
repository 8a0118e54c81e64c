"""Laws of the noise schedule."""

import pytest
import torch

from sat_train.diffusion.schedule import zero_snr_alpha_bar


def _snr(alpha_bar):
    return alpha_bar / (1 - alpha_bar)


@pytest.mark.parametrize("options", [{}, {"keep_start": True}, {"post_shift": True}])
@pytest.mark.parametrize("shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_timesteps", [2, 10, 1000])
def test_it_falls_from_nearly_all_signal_to_none(num_timesteps, shift_scale, options):
    alpha_bar = zero_snr_alpha_bar(num_timesteps, shift_scale, **options)
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.shape == (num_timesteps,)
    assert 0.99 < alpha_bar[0] < 1.0
    assert alpha_bar[-1] == 0.0
    assert bool((alpha_bar.diff() < 0).all())


def test_a_shift_after_the_rescaling_divides_the_snr_everywhere():
    plain, shifted = zero_snr_alpha_bar(), zero_snr_alpha_bar(shift_scale=3.0, post_shift=True)
    torch.testing.assert_close(_snr(shifted), _snr(plain) / 3.0, rtol=1e-12, atol=0)


def test_a_shift_before_the_rescaling_divides_the_snr_at_the_start():
    plain, shifted = zero_snr_alpha_bar(), zero_snr_alpha_bar(shift_scale=3.0)
    assert _snr(shifted)[0].item() == pytest.approx(_snr(plain)[0].item() / 3.0, rel=1e-12)


def test_keep_start_begins_where_the_unshifted_schedule_does():
    plain, kept = zero_snr_alpha_bar(), zero_snr_alpha_bar(shift_scale=3.0, keep_start=True)
    assert kept[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
