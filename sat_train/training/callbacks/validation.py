"""Validates at intervals: the loss, and videos of fixed prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sat_train.training.callbacks.callback import Callback
from sat_train.training.entries import ValidationEntry

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer


class Validation(Callback):
    """Measures the validation loss before the first step, every `interval` steps and after the last.

    Args:
        engine: DeepSpeed engine, put into evaluation mode meanwhile.
        measure: Step -> entry, on all ranks.
        interval: Steps between validations.
    """

    def __init__(self, engine: Any, measure: Callable[[int], ValidationEntry], *, interval: int) -> None:
        self._engine = engine
        self._measure = measure
        self._interval = interval
        self._measured_step = -1

    def started(self, trainer: Trainer) -> None:
        """Measures where a new run begins; a run that goes on has done so."""
        if trainer.state.step == 0:
            self._validate(trainer)

    def step_done(self, trainer: Trainer) -> None:
        """Measures when it is time."""
        if trainer.state.step % self._interval == 0 or trainer.complete:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        if trainer.stopping:
            return  # whoever asked us to stop will not wait
        self._engine.eval()
        try:
            entry = self._measure(trainer.state.step)
        finally:
            self._engine.train()
        trainer.report(entry)
