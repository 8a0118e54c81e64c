"""Reference frames behind the video in time: identity, style, or what came before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders


class ReferenceFrames(Condition):
    """Clean latent frames that attention reads; they leave the sequence before the final layer.

    Source: arXiv:2503.14151 (Concat-ID) continues the positions, arXiv:2505.21491 (FrameINO) repeats the
    first one.
    """

    tensors = frozenset({"mean", "logvar"})
    reads_caption = False

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the moments of the picture or the video, (f, c, h, w)."""
        frames = sample.fields[self.params.field]
        frames_tchw = frames[None] if frames.dim() == 3 else frames
        return encoders.video(frames_tchw, subject=f"{sample.clip_id} {self.name}")

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the latent frames, padded in front to whole patches, and their positions in time."""
        frames_bfchw = self.latent(encoded, random)
        first = latent_shape[1] if self.params.position == "continue" else 0
        return DitInputs(
            frames_bfchw=frames_bfchw, frame_index_f=torch.arange(first, first + frames_bfchw.shape[1])
        )
