"""Validation at intervals: the loss, and videos of fixed prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sat_train.engine.engine import TrainEngine
from sat_train.training.loop.callback import Callback, Training
from sat_train.training.loop.metrics import ValidationMetrics


class Measure(Protocol):
    """Measures the held-out clips: `HeldOutClips.measure`."""

    def __call__(
        self, step: int, asked_to_stop: Callable[[], bool], *, with_report: bool
    ) -> ValidationMetrics | None:
        """Returns the metrics of a step; None when interrupted. Ranks: all."""


class Validation(Callback):
    """Measures the validation loss before the first step, every `interval` steps and after the last.

    A request to stop interrupts it. A validation that was due at the step that a run resumes, and did not
    happen because that run ended before, comes first.

    Args:
        engine: The engine, put into evaluation mode meanwhile.
        measure: Measures the held-out clips.
        interval: Steps between validations.
        report_every: One validation in so many reports on the conditions, and the last one.
        is_measured: Returns whether the loss at a step is known already; on all ranks.
    """

    def __init__(
        self,
        engine: TrainEngine,
        measure: Measure,
        *,
        interval: int,
        report_every: int = 1,
        is_measured: Callable[[int], bool],
    ) -> None:
        self._engine = engine
        self._measure = measure
        self._interval = interval
        self._report_every = report_every
        self._is_measured = is_measured

    def started(self, trainer: Training) -> None:
        """Measures at the start of a new run, and makes up for a validation that a resumed run has missed."""
        if self._is_due(trainer) and not self._is_measured(trainer.state.step):
            self._validate(trainer)

    def step_done(self, trainer: Training) -> None:
        """Measures when a validation is due."""
        if self._is_due(trainer):
            self._validate(trainer)

    def _is_due(self, trainer: Training) -> bool:
        return trainer.state.step % self._interval == 0 or trainer.complete

    def _validate(self, trainer: Training) -> None:
        if trainer.stopping:
            return
        step = trainer.state.step
        with_report = step // self._interval % self._report_every == 0 or trainer.complete
        self._engine.eval()
        try:
            metrics = self._measure(step, trainer.asked_to_stop, with_report=with_report)
        finally:
            self._engine.train()
        if metrics is not None:
            trainer.report(metrics)
