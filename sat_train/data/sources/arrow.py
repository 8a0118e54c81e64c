"""Reads Arrow data from strangers, validated before use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sat_train.errors import DataError

_TEXT_BYTES = 1 << 30  # of one batch; what is read becomes Python objects


def import_pyarrow(path: Path) -> Any:
    """Imports pyarrow.

    Raises:
        DataError: It is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading this file needs pyarrow", remedy="pip install pyarrow") from None
    return pyarrow


def checked_rows(batch: Any, *, place: Path) -> list[dict[str, Any]]:
    """Returns the rows of a batch after checking offsets and texts, which Arrow itself trusts.

    Raises:
        DataError: A column has a type that a manifest cannot have, or too many bytes.
        pyarrow.ArrowInvalid: The file is damaged.
    """
    for field in batch.schema:
        if not _is_plain(field.type):
            raise DataError(
                f"{place}: column `{field.name}` has the type {field.type}",
                expected="texts, lists of texts, or numbers",
            )
    batch.validate()  # sizes of buffers, before anything is counted with them
    if batch.nbytes > _TEXT_BYTES:
        raise DataError(f"{place}: {batch.num_rows} rows hold more than {_TEXT_BYTES >> 20} MiB of text")
    batch.validate(full=True)
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _is_plain(kind: Any) -> bool:
    """Returns whether a type holds texts, lists of texts or numbers, whose values fit into their buffers."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )
