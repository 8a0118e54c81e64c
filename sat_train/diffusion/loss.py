"""The training loss and its weighting over noise levels."""

from __future__ import annotations

import torch
from torch import Tensor


def v_mse_per_sample(
    v_pred: Tensor, v_true: Tensor, counted_bt: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error of the velocity per sample, in fp32.

    Equivalent to CogVideo's x0 loss weighted by `1 / (1 - alpha_bar)`, but better conditioned: near t = 0 the
    x0 form multiplies differences below 1e-3 by weights above 1e3.

    Args:
        v_pred: Prediction, shape (b, t, ...), any float dtype.
        v_true: Target of the same shape.
        counted_bt: Frames of each sample that count, bool, at least one per sample; None: all of them.
        weight: Factor on the squares, of a shape that broadcasts to theirs; None: 1.

    Returns:
        float32 of shape (b,): the mean over all elements of the frames that count, whatever their weights.

    Source: zai-org/CogVideo@7a1af71 `sgm/modules/diffusionmodules/loss.py` VideoDiffusionLoss.
    """
    squares = (v_pred.float() - v_true.float()).square()
    if weight is not None:
        squares = squares * weight
    if counted_bt is None:
        return squares.flatten(1).mean(1)
    return (squares.flatten(2).mean(2) * counted_bt).sum(1) / counted_bt.sum(1)


def min_snr_weight(alpha_bar: Tensor, gamma: float) -> Tensor:
    """Weight of the velocity error that reduces the emphasis on nearly clean timesteps (min-SNR).

    An x0 loss has the weight `SNR + 1` in v-space; capped at gamma that is `min(SNR + 1, gamma) / (SNR + 1)`,
    which is `min(1, gamma * (1 - alpha_bar))`. Capping SNR itself would give weight 0 to the last timestep,
    where SNR is 0, and the model would never learn to start from pure noise.

    Args:
        alpha_bar: float64 of any shape.
        gamma: Cap, positive; 5 in the paper.

    Returns:
        Weights in (0, 1] of the shape of `alpha_bar`, float32.

    Source: Hang et al. 2023 (arXiv:2303.09556); zai-org/CogVideo@7a1af71 VideoDiffusionLoss `min_snr_value`.
    """
    return (gamma * (1.0 - alpha_bar)).clamp(max=1.0).to(torch.float32)


def offset_noise(eps: Tensor, offset_b: Tensor, level: float) -> Tensor:
    """Adds to each sample's noise one normal number that all its elements share, to learn brightness.

    Args:
        eps: Noise, shape (b, ...).
        offset_b: One normal number for each sample, shape (b,).
        level: Standard deviation of the shared part; CogVideoX was trained with 0.

    Source: zai-org/CogVideo@7a1af71 VideoDiffusionLoss `offset_noise_level`.
    """
    offset_b = offset_b.to(eps.device, non_blocking=True).to(eps.dtype)
    return eps + level * offset_b.reshape(-1, *[1] * (eps.ndim - 1))
