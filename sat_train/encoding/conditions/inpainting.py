"""Inpainting: the video without its masked part, and the mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import DitInputs, Encoding
from sat_train.encoding.conditions.placed import PlacedCondition
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.errors import SatTrainError
from sat_train.models.encoders import Encoders


class Inpainting(PlacedCondition):
    """The latent of the video with its masked part black, and the mask as one channel behind it.

    A latent element is masked where any of its pixels is, in any frame of its latent frame.

    Source: TencentARC/VideoPainter@bbab6cd, whose context is the masked video's latent and the mask.
    """

    tensors = frozenset({"mean", "logvar", "mask"})

    def __init__(self, params: object = None, model: object = None) -> None:
        super().__init__(params, model)
        self.augments = self.params.grow > 0

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the moments of the visible part, (t, c, h, w), and `mask`, (padded t, 1, h, w), 0 or 1."""
        mask_t1hw = self._grown(sample.fields[self.params.mask].float(), sample)
        video = self._video(sample, len(mask_t1hw))
        visible = (video * (mask_t1hw < 0.5)).to(torch.uint8)
        moments = encoders.video(visible, subject=f"{sample.clip_id} {self.name}")
        grid = self.latent_shape(sample)
        cells = F.adaptive_max_pool2d(mask_t1hw, (grid.height, grid.width))
        mask = self.latent_frames(cells, "stack").amax(dim=1)
        return {**moments, "mask": mask.to(encoders.device)}

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns latent and mask on channels."""
        latent = self.latent(encoded, random)
        return self.placed(torch.cat([latent, encoded["mask"].to(latent)], dim=2))

    def _grown(self, mask_t1hw: Tensor, sample: VideoSample) -> Tensor:
        """Returns the mask, in training with a border of random width."""
        if not self.augments or not sample.training:
            return mask_t1hw
        generator = sample.generator("mask_growth")
        border = int(torch.randint(self.params.grow + 1, (), generator=generator))
        return F.max_pool2d(mask_t1hw, 2 * border + 1, stride=1, padding=border)

    def _video(self, sample: VideoSample, frames: int) -> Tensor:
        """Returns the video that is painted in, uint8 `[t, 3, h, w]`."""
        field = self.params.video
        video = sample.video_tchw if field is None else sample.fields[field]
        if len(video) != frames:
            raise SatTrainError(
                f"condition '{self.name}': {frames} frames of mask, {len(video)} of {field or 'the clip'}",
                expected="a mask for each frame of the video",
                remedy="to sample, name a field that holds the video in `params.video`, and give it",
            )
        return video
