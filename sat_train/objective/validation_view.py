"""The base of validation views: numbers and pictures of held-out clips, from what a loss term sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sat_train.objective.loss_inputs import LossInputs


class ValidationView:
    """A view of the held-out clips. It is called at each timestep of a validation, without gradient.

    Noise and timesteps are those of the validation loss, the same each time, and nothing is dropped. Every
    rank makes the same calls: compute for all rows, whatever the clips are.

    Args:
        params: The part's parameter record.
        model: The model's description.
    """

    def __init__(self, params: Any = None, model: Any = None) -> None:
        self.params, self.model = params, model

    def numbers(self, step: LossInputs) -> Mapping[str, Tensor]:
        """Returns numbers of each clip, `[b]`, by a name that is the same in every batch."""
        return {}

    def pictures(self, step: LossInputs) -> Mapping[str, Tensor]:
        """Returns frames that show each clip, uint8 `[b, t, 3, h, w]` on any device, by name.

        It is called only where a clip is to be shown, so on some ranks alone: without collectives.
        """
        return {}
