"""A table of clips: JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sat_train.data.sources.records import ClipRecord, ClipSource, check_faults, clean_caption, make_source
from sat_train.errors import DataError
from sat_train.log import get_logger

log = get_logger(__name__)


def read_manifest(path: Path) -> ClipSource:
    """Reads a table of clips: `.jsonl`, `.csv` or `.parquet`.

    Columns: `video`, `caption` (a text, or in JSON and Parquet a list of texts) and optionally `image`,
    `start`, `end` (seconds) and `weight`. Relative paths start at the manifest. Other columns are named
    once and ignored.

    Raises:
        DataError: A row is unusable (all of them are counted, the first ten named) or there is none.
    """
    rows = list(_rows(path))
    records, faults, unknown = [], [], Counter()
    for line, row in rows:
        try:
            records.append(make_record(row, path.absolute().parent))
        except DataError as error:
            faults.append(f"{path}:{line}: {error.problem}")
        unknown.update(set(row) - _COLUMNS)
    check_faults(faults, f"{path}: {len(faults)} of {len(rows)} rows cannot be used")
    if not records:
        raise DataError(f"{path}: this manifest has no rows", expected="one row for each clip")
    if unknown:
        log.info("%s: columns that mean nothing here: %s", path, ", ".join(sorted(unknown)))
    return make_source(str(path), records)


_COLUMNS = {"video", "caption", "image", "start", "end", "weight"}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number and columns of each row; absent values are left out."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a file of this suffix is no data set",
            expected=f"a folder, or a manifest ({', '.join(readers)})",
        )
    for line, row in reader(path):
        yield line, {key: value for key, value in row.items() if value is not None and value != ""}


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line}: this is no JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: expected an object, found {text.strip()[:40]}")
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                raise DataError(f"{path}:{reader.line_num}: more cells than the header has columns")
            yield reader.line_num, row


def _parquet_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow", remedy="pip install pyarrow") from None
    return enumerate(parquet.read_table(path).to_pylist(), 1)


def make_record(row: dict[str, Any], root: Path) -> ClipRecord:
    """Makes a record of the columns of one row.

    Args:
        row: Columns that have a value.
        root: Where relative paths start.

    Raises:
        DataError: Something is missing or makes no sense.
    """
    if not isinstance(row.get("video"), str):
        raise DataError("column `video` is missing")
    for column in ("video", "image"):
        if "://" in str(row.get(column, "")):
            raise DataError(f"column `{column}`: remote files are read from .tar archives only")
    texts = row.get("caption", [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError("column `caption` is missing or no text")
    captions = tuple(clean_caption(text, "column `caption`") for text in texts)
    start, end = _number(row, "start"), _number(row, "end")
    if start is not None and end is not None and end <= start:
        raise DataError(f"`end` = {end:g} is not after `start` = {start:g}")
    weight = _number(row, "weight")
    part = "" if start is None and end is None else f"[{start or 0:g}-{'' if end is None else f'{end:g}'}]"
    image = root / str(row["image"]) if "image" in row else None
    return ClipRecord(
        clip_id=row["video"] + part,
        path=root / row["video"],
        captions=captions,
        start=start,
        end=end,
        image=image,
        weight=1.0 if weight is None else weight,
    )


def _number(row: dict[str, Any], key: str) -> float | None:
    if key not in row:
        return None
    try:
        number = float(row[key])
    except (TypeError, ValueError):
        raise DataError(f"`{key}` = {row[key]!r} is no number") from None
    if not 0 <= number < 1e12:
        raise DataError(f"`{key}` = {number:g} is not a finite number from 0 up")
    return number
