"""The numbers of a field for modules, as they are: SAT's way from a batch to a mixin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders


class FieldValues(Condition):
    """The numbers of a field as a named tensor for modules, batch first.

    Source: zai-org/CogVideo@7a1af71 `sat/sgm/modules/diffusionmodules/loss.py`, `batch2model_keys`.
    """

    tensors = frozenset({"values"})
    reads_caption = False

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns `values`, float32, for pixel frames or for latent frames."""
        values = sample.fields[self.params.field].float()
        if self.params.frames != "pixel":
            values = self.latent_frames(values, self.params.frames)
        return {"values": values.to(encoders.device)}

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the values under the condition's own name."""
        return DitInputs(extras={self.name: encoded["values"]})
