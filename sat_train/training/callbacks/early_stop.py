"""Early stop: ends a run whose validation loss does not fall any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sat_train.distributed.collectives import broadcast_object
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.callbacks.metrics_file import read_validation_losses
from sat_train.training.loop.callback import Callback, Training
from sat_train.training.loop.metrics import Metrics, ValidationMetrics


class EarlyStop(Callback):
    """Finishes the run after `patience` validations in a row without a lower loss. Called after validation.

    Rank 0 decides from the losses in `metrics.jsonl` and those reported since, so that a resumed run counts
    on, and one that goes back to an earlier step forgets the later validations.

    Args:
        mesh: The process mesh.
        run_directory: The run directory; None for a run that keeps nothing.
        patience: Validations.
        min_delta: A loss is lower only by more than this.
    """

    def __init__(
        self, mesh: ProcessMesh, run_directory: Path | None, *, patience: int, min_delta: float
    ) -> None:
        self._mesh, self._run_directory = mesh, run_directory
        self._patience, self._min_delta = patience, min_delta
        self._losses: dict[int, float] = {}
        self._is_new = False

    def started(self, trainer: Training) -> None:
        """Reads the validations up to the resumed step, and decides."""
        if self._mesh.rank == 0 and self._run_directory is not None:
            earlier = read_validation_losses(self._run_directory)
            known = {step: loss for step, loss in earlier.items() if step <= trainer.state.step}
            self._losses = {**known, **self._losses}
        self._decide(trainer)

    def reported(self, metrics: Metrics) -> None:
        """Remembers the loss of a validation."""
        if isinstance(metrics, ValidationMetrics):
            self._losses[metrics.step] = metrics.valid_loss.mean
            self._is_new = True

    def step_done(self, trainer: Training) -> None:
        """Decides after a validation."""
        if self._is_new:
            self._decide(trainer)

    def _decide(self, trainer: Training) -> None:
        self._is_new = False
        reason = exhausted_patience(self._losses, patience=self._patience, min_delta=self._min_delta)
        reason = broadcast_object(self._mesh, reason)
        if reason and not trainer.complete:
            trainer.finish(reason)


def exhausted_patience(losses: Mapping[int, float], *, patience: int, min_delta: float) -> str:
    """Returns why a run with these validation losses ends, or nothing while it may train.

    Args:
        losses: Validation losses by step.
        patience: Validations in a row without a lower loss that end it.
        min_delta: A loss is lower only by more than this; one that is not finite never is.
    """
    best, best_step, waited = float("inf"), 0, 0
    for step in sorted(losses):
        if losses[step] < best - min_delta:
            best, best_step, waited = losses[step], step, 0
        else:
            waited += 1
        if waited >= patience:
            less = f" - {min_delta:g}" if min_delta else ""
            return f"{waited} validations in a row not below {best:.5f}{less}, the loss of step {best_step}"
    return ""
