"""`metrics.jsonl`: one JSON object per report, for programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sat_train.config.parts.callback_parts import MetricsFileParams
from sat_train.log import get_logger
from sat_train.training.callbacks.step_records import StepRecords, read_records
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import Metrics, VideoMetrics, as_json

log = get_logger(__name__)

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


def read_validation_losses(run_directory: Path) -> dict[int, float]:
    """Returns the validation losses of a run by step; NaN for one that was not finite.

    Where the file cannot be read, which is logged, there are none.
    """
    try:
        records = read_metrics(run_directory / NAME)
    except OSError as error:
        log.warning("%s cannot be read, so its validations are not known: %s", run_directory / NAME, error)
        return {}
    losses = {record["step"]: record["valid_loss"] for record in records if "valid_loss" in record}
    return {step: math.nan if loss is None else float(loss) for step, loss in losses.items()}


def build(params: MetricsFileParams, context: CallbackContext) -> MetricsFile:
    """Builds the callback of a run."""
    return MetricsFile(context.folder())
