"""`metrics.jsonl`: one JSON object per report, for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sat_train.config.parts.callback_parts import MetricsFileParams
from sat_train.training.callbacks.step_records import StepRecords, read_records
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import Metrics, VideoMetrics, as_json

NAME = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends to `metrics.jsonl`. A run that resumes at step k first drops the records after k. Rank 0 only.

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
        """Appends one line."""
        if not isinstance(metrics, VideoMetrics):  # its files show it
            self._records.append(as_json(metrics))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`.

    Raises:
        OSError: It cannot be read.
    """
    return read_records(path)


def build(params: MetricsFileParams, context: CallbackContext) -> MetricsFile:
    """Builds the callback of a run."""
    return MetricsFile(context.folder())
