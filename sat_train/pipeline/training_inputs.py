"""What goes into one loss, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainingInputs:
    """Everything one loss needs beside the weights; all of it is fixed before the network runs.

    Args:
        x0_btchw: Scaled latent of the clips, padded in time, float32.
        eps_btchw: Noise of the same shape.
        timesteps_b: int64, on the CPU.
        text_bld: Text embeddings after the caption drop, in the network's dtype.
        image_latent_btchw: Condition of image-to-video, of the shape of `x0_btchw`; None for text-to-video.
        counted_bt: Which latent frames count in the loss, bool; None: all of them.
    """

    x0_btchw: Tensor
    eps_btchw: Tensor
    timesteps_b: Tensor
    text_bld: Tensor
    image_latent_btchw: Tensor | None
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
