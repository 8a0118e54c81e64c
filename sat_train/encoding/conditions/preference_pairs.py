"""Preference pairs: videos that lost against the clip."""

from __future__ import annotations

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import Condition
from sat_train.models.encoders import Encoders


class PreferencePairs(Condition):
    """The latents of the losers. They are no input of the network: the objective makes rows of them."""

    tensors = frozenset({"mean", "logvar"})
    reads_caption = False

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the moments of the losers, (n, t, c, h, w)."""
        videos = sample.fields[self.params.field]
        each = [encoders.video(video, subject=f"{sample.clip_id} {self.name}") for video in videos]
        return {name: torch.stack([moments[name] for moments in each]) for name in each[0]}
