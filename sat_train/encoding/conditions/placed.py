"""Conditions whose tensor stands next to the latent on channels, or goes to modules by name."""

from __future__ import annotations

from torch import Tensor

from sat_train.encoding.conditions.condition import Condition, DitInputs


class PlacedCondition(Condition):
    """Base of conditions with a setting `into`."""

    reads_caption = False

    def placed(self, tensor_btchw: Tensor) -> DitInputs:
        """Returns a tensor of the latent's frames and grid as the settings place it."""
        if self.params.into == "channels":
            return DitInputs(channels_btchw=tensor_btchw)
        return DitInputs(extras={self.name: tensor_btchw})
