"""`metrics.jsonl`: one JSON object per report, for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sat_train.config.parts.callback_parts import MetricsFileParams
from sat_train.files import read_bytes, write_text
from sat_train.training.callbacks.appended_file import AppendedFile
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import Metrics, VideoMetrics, as_json

NAME = "metrics.jsonl"
_MOST_BYTES = 2**29  # two million steps, each logged


class MetricsFile(Callback):
    """Appends to `metrics.jsonl`. A run that resumes at step k first drops the records after k. Rank 0 only.

    Args:
        run_directory: Folder of the file.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / NAME
        self._file = AppendedFile(self._path)
        self._resumed_step: int | None = None

    def started(self, trainer: Training) -> None:
        """Drops records after the checkpoint that the run resumes."""
        self._resumed_step = trainer.state.step
        self._drop_later_records()

    def reported(self, metrics: Metrics) -> None:
        """Appends one line."""
        if isinstance(metrics, VideoMetrics):
            return  # its files show it
        values = {name: _finite_or_none(value) for name, value in as_json(metrics).items()}
        self._file.add((json.dumps(values) + "\n").encode())
        if self._resumed_step is not None:
            self._drop_later_records()  # the disk was full at the start
        self._file.write()

    def _drop_later_records(self) -> None:
        records = [record for record in read_metrics(self._path) if record["step"] <= self._resumed_step]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))
        self._resumed_step = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; none when there is no file. A line torn by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in read_bytes(path, limit=_MOST_BYTES).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _finite_or_none(value: object) -> object:
    """Returns None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite_or_none(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build(params: MetricsFileParams, context: CallbackContext) -> MetricsFile:
    """Builds the callback of a run."""
    return MetricsFile(context.folder())
