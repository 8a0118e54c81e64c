"""The noise schedule: the share of the signal at each training timestep."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_snr_alpha_bar(
    num_timesteps: int = 1000,
    shift_scale: float = 1.0,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    keep_start: bool = False,
    post_shift: bool = False,
) -> Tensor:
    """Scaled-linear DDPM schedule with shifted SNR, rescaled so that the last timestep is pure noise.

    Args:
        num_timesteps: Number of training timesteps.
        shift_scale: Divides the SNR at every timestep; 3.0 for CogVideoX-2B, 1.0 for the other family
            members.
        beta_start: Variance added at the first timestep.
        beta_end: Variance added at the last timestep, before the rescaling.
        keep_start: Use a smaller first variance, so that the shift brings it back to `beta_start`.
        post_shift: Shift after the rescaling instead of before; `keep_start` then has no effect.

    Returns:
        `alpha_bar` of shape (num_timesteps,), float64, falling from nearly 1 to exactly 0: the signal's share
        of the variance at each timestep.

    Source: Lin et al. 2024 (arXiv:2305.08891) algorithm 1 for the zero terminal SNR; zai-org/CogVideo@7a1af71
    `sgm/modules/diffusionmodules/discretizer.py` ZeroSNRDDPMDiscretization, and diffusers 0.42
    `CogVideoXDDIMScheduler` with `rescale_betas_zero_snr`, for the order of shift and rescaling.
    """
    if keep_start and not post_shift:
        beta_start = beta_start / (shift_scale + (1.0 - shift_scale) * beta_start)
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1.0 - beta, dim=0)
    if post_shift:
        return _shift_snr(_zero_terminal_snr(alpha_bar), shift_scale)
    return _zero_terminal_snr(_shift_snr(alpha_bar, shift_scale))


def _shift_snr(alpha_bar: Tensor, shift_scale: float) -> Tensor:
    return alpha_bar / (shift_scale + (1.0 - shift_scale) * alpha_bar)


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shifts and scales `sqrt(alpha_bar)` so that it ends at 0 with its first value unchanged."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
