"""A control video as pixels on the grid of the latent, for a branch with an encoder of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders


class ControlPixels(Condition):
    """The pixels of a video that is aligned with the clip. Where it is dropped, the video is black.

    The area of a latent element, and the frames of a latent frame, stand on channels: frame, then colour,
    then row and column in the area. The first frame stands for all of its latent frame.
    """

    tensors = frozenset({"pixels"})
    reads_caption = False

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns `pixels`, uint8 (t, c, h, w), of the latent's frames and size."""
        folded = F.pixel_unshuffle(sample.fields[self.params.field], self.model.spatial_compression)
        return {"pixels": self.latent_frames(folded, "stack").flatten(1, 2).to(encoders.device)}

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the pixels, -1 to 1, under the condition's own name."""
        return DitInputs(extras={self.name: encoded["pixels"].float().div_(127.5).sub_(1)})
