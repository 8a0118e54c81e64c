"""`metrics.jsonl`: one JSON object an entry, for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_train.files import read_bytes, write_text
from sat_train.training.callbacks.appended_file import AppendedFile
from sat_train.training.callbacks.callback import Callback
from sat_train.training.entries import Entry, SamplesEntry, as_json

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer

NAME = "metrics.jsonl"
_MOST_BYTES = 2**29  # two million steps, each of them logged


class MetricsFile(Callback):
    """Appends to `metrics.jsonl`. A run that resumes at step k first drops the entries after k. For rank 0.

    Args:
        run_directory: Where the file is.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / NAME
        self._file = AppendedFile(self._path)
        self._resumed_step: int | None = None

    def started(self, trainer: Trainer) -> None:
        """Drops what was written after the checkpoint that the run resumes."""
        self._resumed_step = trainer.state.step
        self._drop_later_entries()

    def reported(self, entry: Entry) -> None:
        """Appends one line."""
        if isinstance(entry, SamplesEntry):
            return  # its files say it
        values = {name: _finite_or_none(value) for name, value in as_json(entry).items()}
        self._file.add((json.dumps(values) + "\n").encode())
        if self._resumed_step is not None:
            self._drop_later_entries()  # the disk was full at the start
        self._file.write()

    def _drop_later_entries(self) -> None:
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= self._resumed_step]
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._resumed_step = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a file; none when there is no file. A line torn by a kill is left out."""
    if not path.exists():
        return []
    entries = []
    for line in read_bytes(path, limit=_MOST_BYTES).splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _finite_or_none(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite_or_none(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
