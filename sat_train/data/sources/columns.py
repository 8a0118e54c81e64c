"""Maps the columns of a table to their meaning: by exact name, by a common name, or by `data.columns`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_train.data.sources.records import check_name, name_some
from sat_train.errors import DataError

KINDS = ("video", "caption", "image", "start", "end", "weight")
# Names that other trainers and data sets give to the two columns that every table has.
COMMON = {
    "video": (
        *("video_path", "video_file", "videos", "file_name", "filename", "file"),
        *("file_path", "path", "media_path"),
    ),
    "caption": ("captions", "text", "prompt", "description", "video_caption"),
}


def find_columns(names: Iterable[str], choices: Mapping[str, str], *, place: str) -> dict[str, str]:
    """Finds the columns of a table by their meaning.

    What `data.columns` names counts first, then a column of the very name, then, for `video` and `caption`,
    the one of a common name, in any case.

    Args:
        names: The columns that were found.
        choices: `data.columns`: for a kind of column, its name in the table.
        place: The table, for messages.

    Returns:
        The name in the table of each kind of column that it has.

    Raises:
        DataError: Several columns may be meant, or one of `wanted` is missing.
    """
    names = list(dict.fromkeys(names))
    columns = {}
    for kind in KINDS:
        candidates = _candidates(kind, names)
        if kind in choices:
            candidates = [choices[kind]]
            if choices[kind] not in names:
                raise DataError(
                    f"{place}: there is no column `{choices[kind]}`; {shown_columns(names)}",
                    expected=f"the column that data.columns.{kind} names",
                    remedy=f"correct data.columns.{kind}",
                )
        if len(candidates) > 1:
            listed = ", ".join(f"`{name}`" for name in candidates)
            raise DataError(
                f"{place}: each of the columns {listed} may be the {kind}",
                expected=f"one column `{kind}`, or a choice among these",
                remedy=f"data.columns.{kind}={candidates[0]}",
            )
        if candidates:
            columns[kind] = candidates[0]
    return columns


def _candidates(kind: str, names: Sequence[str]) -> list[str]:
    if kind in names:
        return [kind]
    return [name for name in names if kind in COMMON and name.strip().lower() in (kind, *COMMON[kind])]


def check_columns(columns: Mapping[str, str], names: Iterable[str], *, place: str) -> None:
    """Refuses a table without the required columns.

    Raises:
        DataError: One is missing; the message lists those that were found and says what to do.
    """
    names = list(names)
    for kind, common in COMMON.items():
        if kind not in columns:
            raise DataError(
                f"{place}: there is no column `{kind}`; {shown_columns(names)}",
                expected=f"`{kind}`, or one of {', '.join(common)}",
                remedy=f"choose it with data.columns.{kind}=NAME",
            )


def shown_columns(names: Iterable[str]) -> str:
    """Returns a message that lists the columns of a table."""
    names = [f"`{name}`" for name in names]
    return f"the columns found are {name_some(names)}" if names else "it has no columns"


def cell_path(row: Mapping[str, Any], kind: str, root: Path) -> str:
    """Returns the path in a cell, with Windows backslashes turned into slashes.

    Raises:
        DataError: It is missing, remote, or no path.
    """
    path = row.get(kind)
    if not isinstance(path, str):
        raise DataError(f"column `{kind}` is missing" if path is None else f"column `{kind}` is not a text")
    if "://" in path:
        raise DataError(f"column `{kind}`: remote files are read from .tar archives only")
    check_name(path)
    is_foreign = "\\" in path and not os.path.exists(root / path)
    return path.replace("\\", "/") if is_foreign else path
