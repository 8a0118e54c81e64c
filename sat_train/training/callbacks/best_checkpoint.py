"""The file `best`: the saved step with the lowest validation loss."""

from __future__ import annotations

import math
from pathlib import Path

from sat_train.checkpoint.history import point_best
from sat_train.checkpoint.layout import committed_steps
from sat_train.log import get_logger
from sat_train.training.callbacks.metrics_file import read_validation_losses
from sat_train.training.loop.callback import Callback, Training
from sat_train.training.loop.metrics import Metrics, ValidationMetrics

log = get_logger(__name__)


class BestCheckpoint(Callback):
    """Points `best` at the saved step with the lowest validation loss. Rank 0 only.

    Called after the checkpoints are written. What it knows of earlier validations it reads from
    `metrics.jsonl`, so that a run that goes back to an earlier step forgets the later ones.

    Args:
        run_directory: The run directory.

    Attributes:
        step: That step; None before a saved step was validated.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._losses: dict[int, float] = {}
        self.step: int | None = None

    def started(self, trainer: Training) -> None:
        """Reads the validations up to the resumed step."""
        losses = read_validation_losses(self._run_directory)
        self._losses = {step: loss for step, loss in losses.items() if step <= trainer.state.step}
        self._point()

    def reported(self, metrics: Metrics) -> None:
        """Compares a validated step with the best one."""
        if isinstance(metrics, ValidationMetrics):
            self._losses[metrics.step] = metrics.valid_loss.mean
            self._point()

    def saved(self, step: int) -> None:
        """Considers a step that may have been validated before it was saved."""
        self._point()

    def _point(self) -> None:
        saved = committed_steps(self._run_directory)
        losses = {step: loss for step, loss in self._losses.items() if step in saved and math.isfinite(loss)}
        best = min(losses, key=lambda step: (losses[step], step), default=None)
        if best is not None and best != self.step:
            log.info("best so far: step %d, validation loss %.5f", best, losses[best])
        self.step = best  # known to the retention of checkpoints even if the disk is full
        point_best(self._run_directory, best)
