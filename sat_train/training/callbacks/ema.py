"""An exponential moving average of the trained weights, split over the ranks like their fp32 masters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sat_train.checkpoint.fragments import AVERAGE, Fragment, SavedFragments
from sat_train.engine.engine import TrainEngine
from sat_train.errors import CheckpointError
from sat_train.training.loop.callback import Callback, Training


class ExponentialMovingAverage(Callback):
    """`average <- decay * average + (1 - decay) * weights`, after every step that updated the weights.

    Args:
        engine: The engine; its current weights are the first average.
        decay: In (0, 1).
    """

    def __init__(self, engine: TrainEngine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._averages = [master.float().clone() for master in engine.masters()]

    def step_done(self, trainer: Training) -> None:
        """Adds the weights of this step to the average."""
        if trainer.applied:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights to the average."""
        masters = [master.float() for master in self._engine.masters()]
        torch._foreach_lerp_(self._averages, masters, 1 - self.decay)

    def add_tensors(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Adds the average to each of the engine's fragments, as one more tensor."""
        return [
            replace(fragment, tensors={**fragment.tensors, AVERAGE: average})
            for fragment, average in zip(fragments, self._averages, strict=True)
        ]

    def load_tensors(self, saved: SavedFragments) -> None:
        """Restores the average of a checkpoint, however it was split.

        Raises:
            CheckpointError: The checkpoint holds no average.
        """
        for slot, average in zip(self._engine.slots, self._averages, strict=True):
            if AVERAGE not in saved.kinds(slot.name):
                raise CheckpointError(
                    f"{saved.where} holds no average of {slot.name}",
                    expected="the average for args.ema_decay",
                    remedy="resume without args.ema_decay, or start from its weights with args.load",
                )
            average.copy_(saved.read(slot.name, AVERAGE, offset=slot.offset, count=slot.count))
