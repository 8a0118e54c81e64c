"""`metrics.jsonl`: one JSON object an entry, for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from sat_train.training.callbacks.callback import Callback
from sat_train.training.entries import Entry, as_json

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer

NAME = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends to `metrics.jsonl`. A run that goes on from step k first drops the entries after k. For rank 0.

    Args:
        run_folder: Where the file is.
    """

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / NAME

    def started(self, trainer: Trainer) -> None:
        """Drops what was written after the checkpoint that the run goes on from."""
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= trainer.state.step]
        part = self._path.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        part.replace(self._path)

    def reported(self, entry: Entry) -> None:
        """Appends one line."""
        values = {name: _finite_or_none(value) for name, value in as_json(entry).items()}
        with open(self._path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """Returns the entries of a file; none when there is no file. A last line torn by a kill is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _finite_or_none(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
