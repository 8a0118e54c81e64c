"""Inputs of one loss, and its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sat_train.encoding.conditions.condition import DitInputs, Encoding
from sat_train.encoding.conditions.randomness import SampleRandomness


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """All inputs of one loss besides the weights; they are fixed before the network runs.

    Args:
        x0_btchw: Scaled latent of the clips, padded in time, float32.
        eps_btchw: Noise of the same shape.
        timesteps_b: int64, on the CPU.
        levels_bt: Timestep of each latent frame, -1 where it is clean, on the CPU; None: the sample's.
        dit: Inputs of the transformer from the conditions, after drop-out.
        counted_bt: True at latent frames that count in the loss, bool; None: all of them.
        encoded: Encodings of the conditions, before drop-out, for loss terms.
        random: Random numbers of the samples, for loss terms.
        padding: Latent frames of `x0_btchw` in front of the clip's.
        num_samples: Samples; with preference pairs each is several rows (`add_losers`).
    """

    x0_btchw: Tensor
    eps_btchw: Tensor
    timesteps_b: Tensor
    levels_bt: Tensor | None
    dit: DitInputs
    counted_bt: Tensor | None
    encoded: Mapping[str, Encoding]
    random: SampleRandomness
    padding: int
    num_samples: int


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch.

    Args:
        loss: Mean over the samples, a float32 scalar with a gradient.
        loss_b: Loss of each sample, float32 of shape (b,), without gradient.
        timesteps_b: int64 of shape (b,), on the CPU.
        terms: Unweighted loss of each sample by term, float32 of shape (b,), without gradient.
    """

    loss: Tensor
    loss_b: Tensor
    timesteps_b: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
