"""A control video: its latent next to that of the clip, or for a branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import DitInputs, Encoding
from sat_train.encoding.conditions.placed import PlacedCondition
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders


class ControlVideo(PlacedCondition):
    """The latent of a video that is aligned with the clip."""

    tensors = frozenset({"mean", "logvar"})

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the moments of the field, (t, c, h, w)."""
        return encoders.video(sample.fields[self.params.field], subject=f"{sample.clip_id} {self.name}")

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the latent, scaled and padded as the clip's."""
        return self.placed(self.latent(encoded, random))
