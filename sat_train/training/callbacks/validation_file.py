"""`validation.jsonl`: the loss of each clip in each validation, so that runs can be compared clip by clip."""

from __future__ import annotations

from pathlib import Path

from sat_train.errors import DataError
from sat_train.files import reading
from sat_train.training.callbacks.step_records import StepRecords, read_records
from sat_train.training.loop.callback import Callback, Training
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.metrics import Metrics, ValidationMetrics

NAME = "validation.jsonl"


class ValidationFile(Callback):
    """Appends each validation's losses by clip. Rank 0 only.

    Args:
        run_directory: Folder of the file.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._records = StepRecords(run_directory / NAME)

    def started(self, trainer: Training) -> None:
        """Drops records after the checkpoint that the run resumes."""
        self._records.resume(trainer.state.step)

    def reported(self, metrics: Metrics) -> None:
        """Appends the losses of a validation."""
        if isinstance(metrics, ValidationMetrics):
            self._records.append({"step": metrics.step, **metrics.losses.as_json()})


def read_validations(run_directory: Path) -> dict[int, ClipLosses]:
    """Returns the losses of a run's validations, by step; of one made twice, the later.

    Raises:
        DataError: The file cannot be read, or is not one that a run writes.
    """
    path = run_directory / NAME
    with reading(path, error=DataError, expected="the validation losses of a run", remedy="check the path"):
        return {record["step"]: ClipLosses.from_json(record) for record in read_records(path)}
