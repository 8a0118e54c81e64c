"""Position of a run: the saved state besides weights, optimizer and average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMOOTHING = 0.98


@dataclass
class TrainState:
    """The position of a run. The same on all ranks.

    Args:
        step: Optimizer steps done.
        samples_consumed: Samples trained on, by all ranks together.
        skipped: Steps without an update because a gradient was not finite.
        loss_sum: Exponentially weighted sum of the losses of all steps.
        loss_weight: Sum of its weights; `loss_sum / loss_weight` is the smoothed loss.
    """

    step: int = 0
    samples_consumed: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0

    def take_loss(self, loss: float) -> None:
        """Adds the loss of one step to the smoothed one."""
        self.loss_sum = SMOOTHING * self.loss_sum + (1 - SMOOTHING) * loss
        self.loss_weight = SMOOTHING * self.loss_weight + (1 - SMOOTHING)

    @property
    def loss_smoothed(self) -> float:
        """Weighted mean of the last steps' losses, right from the first step on; NaN before it."""
        return self.loss_sum / self.loss_weight if self.loss_weight else float("nan")

    def client_state(self) -> dict[str, float | int]:
        """Returns state for a checkpoint, except `step` and `samples_consumed`, which its manifest holds."""
        return {"skipped": self.skipped, "loss_sum": self.loss_sum, "loss_weight": self.loss_weight}

    def restore(self, *, step: int, samples_consumed: int, client_state: Mapping[str, Any]) -> None:
        """Restores the position of a checkpoint.

        Raises:
            Exception: `client_state` is not from `client_state`.
        """
        self.step = step
        self.samples_consumed = samples_consumed
        self.skipped = int(client_state["skipped"])
        self.loss_sum = float(client_state["loss_sum"])
        self.loss_weight = float(client_state["loss_weight"])
