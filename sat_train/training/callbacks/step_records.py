"""A file of JSON records, one a line, each of a step of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_train.files import read_bytes, write_text
from sat_train.training.callbacks.appended_file import AppendedFile

_MOST_BYTES = 2**29  # of metrics: two million steps, each logged


class StepRecords:
    """Appends records. A run that resumes at step k first drops the records after k.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = AppendedFile(path)
        self._resumed_step: int | None = None

    def resume(self, step: int) -> None:
        """Drops the records after a step.

        Raises:
            OSError: They could not be dropped; the next `append` tries again.
        """
        self._resumed_step = step
        self._drop_later_records()

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends a record with the key `step`; numbers that are not finite become null.

        Raises:
            OSError: It could not be written; it stays pending.
        """
        self._file.add((json.dumps(_without_nan(record)) + "\n").encode())
        if self._resumed_step is not None:
            self._drop_later_records()  # the disk was full at the start
        self._file.write()

    def _drop_later_records(self) -> None:
        records = [record for record in read_records(self._path) if record["step"] <= self._resumed_step]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))
        self._resumed_step = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; none when there is no file. A line torn by a kill is left out.

    Raises:
        OSError: It cannot be read.
    """
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


def _without_nan(value: Any) -> Any:
    """Returns a value with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
