"""Reads tables of clips: JSON lines, JSON, CSV or Parquet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sat_train.data.clips.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.sources.columns import cell_path, check_columns, find_columns, shown_columns
from sat_train.data.sources.field_places import FieldFinder, columns_of, wanted_columns
from sat_train.data.sources.listing import Listing
from sat_train.data.sources.records import (
    DEFAULT_OPTIONS,
    MAX_WEIGHT,
    ClipRecord,
    ClipSource,
    SourceOptions,
    check_faults,
    clean_caption,
    make_source,
    name_some,
)
from sat_train.data.sources.tables import read_table
from sat_train.errors import DataError


def read_manifest(path: Path, options: SourceOptions = DEFAULT_OPTIONS) -> ClipSource:
    """Reads a table of clips: `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`.

    Columns: `video`, `caption` (a text, or in JSON and Parquet a list of texts) and optionally `image`,
    `start`, `end` (seconds) and `weight`, or those that `find_columns` takes for them. Relative paths start
    at the manifest; any path may be named. A field without a column is found next to the clip's `videos/`.

    Raises:
        DataError: More rows are unusable than allowed (all of them are counted, the first ten named), the
            columns are not there, or there is no row.
    """
    table = read_table(path, options.columns, also=wanted_columns(options.fields).values())
    columns = find_columns(table.columns, options.columns, place=str(path))
    if any(isinstance(row, dict) for _, row in table.rows):
        check_columns(columns, table.columns, place=str(path))
    root, own = path.absolute().parent, columns_of(options.fields, table.columns)
    listing = Listing(root, options)
    finder = FieldFinder(options.fields, root, listing)
    records, faults, turned = [], [], 0
    for line, row in table.rows:
        try:
            record = make_record(canonical_row(row, columns), root)
            record = finder.add(record, cells_of(row, own))
        except DataError as error:
            faults.append((f"{path}:{line}", error.problem))
            continue
        records.append(record)
        turned += isinstance(row, dict) and "\\" in row[columns["video"]] and "\\" not in record.clip_id
    allowed = options.max_bad_fraction * len(table.rows)
    check_faults(faults, f"{path}: {len(faults)} of {len(table.rows)} rows cannot be used", allowed=allowed)
    if not records:
        raise DataError(f"{path}: this manifest has no rows", expected="one row for each clip")
    listing.check_links()
    notes = unused_columns(table.columns, (*columns.values(), *own.values()))
    notes += [f"{turned} paths hold backslashes, which are read as slashes"] if turned else []
    return make_source(str(path), records, notes=notes, faults=faults)


def canonical_row(row: dict[str, Any] | DataError, columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values of a row under the names of `KINDS`.

    Raises:
        DataError: What is wrong with the row, where that is known already, or no column `video` or `caption`.
    """
    if isinstance(row, DataError):
        raise row
    values = cells_of(row, columns)
    for kind in ("video", "caption"):
        if kind not in values:
            raise DataError(f"column `{columns.get(kind, kind)}` is missing; {shown_columns(row)}")
    return values


def cells_of(row: Mapping[str, Any] | DataError, columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the cells of a row by the names of `columns`; those without a value are left out."""
    return {} if isinstance(row, DataError) else {n: row[c] for n, c in columns.items() if c in row}


def unused_columns(columns: Iterable[str], used: Iterable[str]) -> list[str]:
    """Returns a sentence that names the unused columns, if there are any."""
    unused = sorted(set(columns) - set(used))
    return [f"columns that are not used: {name_some(unused)}"] if unused else []


def make_record(row: Mapping[str, Any], root: Path) -> ClipRecord:
    """Builds a record from the columns of one row.

    Args:
        row: Values by kind of column; those that have none are left out.
        root: Where relative paths start.

    Raises:
        DataError: Something is missing or makes no sense.
    """
    video = cell_path(row, "video", root)
    _check_no_folder(root / video)
    texts = row.get("caption", [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError("column `caption` is missing or not a text")
    captions = tuple(clean_caption(text, "column `caption`") for text in texts)
    start, end = _number(row, "start"), _number(row, "end")
    if start is not None and end is not None and end <= start:
        raise DataError(f"`end` = {end:g} is not after `start` = {start:g}")
    weight = _number(row, "weight", limit=MAX_WEIGHT)
    part = "" if start is None and end is None else f"[{start or 0:g}-{'' if end is None else f'{end:g}'}]"
    return ClipRecord(
        clip_id=video + part,
        path=root / video,
        captions=captions,
        start=start,
        end=end,
        image=root / cell_path(row, "image", root) if "image" in row else None,
        weight=1.0 if weight is None else weight,
    )


def _check_no_folder(path: Path) -> None:
    """Refuses folders of frames; only paths without a known suffix are checked on disk."""
    if path.suffix.lower() not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES) and os.path.isdir(path):
        raise DataError("`video` names a folder; folders of frames are not read, make a video file of each")


def _number(row: Mapping[str, Any], key: str, *, limit: float = 1e12) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    try:
        number = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"`{key}` = {repr(value)[:40]} is not a number") from None
    if not 0 <= number <= limit:
        raise DataError(f"`{key}` = {number:g} is not a finite number from 0 to {limit:g}")
    return number
