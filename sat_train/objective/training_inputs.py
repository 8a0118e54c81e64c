"""Inputs of one loss, and its output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sat_train.encoding.conditions.condition import DitInputs


@dataclass(frozen=True)
class TrainingInputs:
    """All inputs of one loss besides the weights; they are fixed before the network runs.

    Args:
        x0_btchw: Scaled latent of the clips, padded in time, float32.
        eps_btchw: Noise of the same shape.
        timesteps_b: int64, on the CPU.
        dit: Inputs of the transformer from the conditions, after drop-out.
        counted_bt: True at latent frames that count in the loss, bool; None: all of them.
    """

    x0_btchw: Tensor
    eps_btchw: Tensor
    timesteps_b: Tensor
    dit: DitInputs
    counted_bt: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch.

    Args:
        loss: Mean over the samples, a float32 scalar with a gradient.
        loss_b: Loss of each sample, float32 of shape (b,), without gradient.
        timesteps_b: int64 of shape (b,), on the CPU.
    """

    loss: Tensor
    loss_b: Tensor
    timesteps_b: Tensor
