"""Reads tables from strangers: JSON lines, JSON, CSV and Parquet, with a limit on everything."""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_train.data.sources.arrow import checked_rows, import_pyarrow
from sat_train.data.sources.columns import COMMON, find_columns
from sat_train.data.sources.records import MAX_ROWS, parse_json
from sat_train.errors import DataError
from sat_train.files import open_regular, read_text, reading

_LINE_BYTES = 16 << 20
_JSON_BYTES = 64 << 20
_BATCH_ROWS = 256
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Row = dict[str, Any] | DataError


@dataclass(frozen=True)
class Table:
    """A table in its original form.

    Args:
        columns: All that it has, in order.
        rows: Line (or number) of each row with its values by column; or with what is wrong with it.
    """

    columns: tuple[str, ...]
    rows: list[tuple[int, Row]]


def read_table(path: Path, choices: Mapping[str, str], *, also: Iterable[str] = ()) -> Table:
    """Reads `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`.

    Bytes that are not UTF-8 become lone surrogates, which are refused where they matter.

    Args:
        path: The file.
        choices: `data.columns`, by which the delimiter of a CSV file is recognised too.
        also: Further columns to read, where there are any of these names.

    Raises:
        DataError: It is no such table, or cannot be read as a whole.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a file of this suffix is no data set",
            expected=f"a folder, or a manifest ({', '.join(_READERS)})",
        )
    columns: dict[str, None] = {}
    rows: list[tuple[int, Row]] = []
    with reading(path, error=DataError, expected=f"a {path.suffix} table of clips"):
        for number, row in reader(path, columns, choices, frozenset(also)):
            rows.append((number, row))
            if len(rows) > MAX_ROWS:
                raise DataError(
                    f"{path}: more than {MAX_ROWS:,} rows", remedy="divide it into several manifests"
                )
    return Table(tuple(columns), rows)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line, including its line ending, without byte order mark.

    Raises:
        DataError: A line is too long, or the file is UTF-16.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        for number in itertools.count(1):
            line = file.readline(_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _LINE_BYTES:
                raise DataError(f"{path}:{number}: a line of more than {_LINE_BYTES >> 20} MiB")
            if number == 1 and line.startswith(_UTF_16):
                raise DataError(f"{path}: this file is UTF-16", remedy="save it as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, line.decode(errors="surrogateescape")


def _jsonl_rows(
    path: Path, columns: dict[str, None], choices: Mapping[str, str], also: frozenset[str]
) -> Iterator[tuple[int, Row]]:
    for number, line in read_lines(path):
        if line.strip():
            yield number, _row_or_fault(_json_line_row, line, columns)


def _row_or_fault(
    read: Callable[[Any, dict[str, None]], dict[str, Any]], content: Any, columns: dict[str, None]
) -> Row:
    try:
        return read(content, columns)
    except DataError as error:
        return error


def _json_line_row(line: str, columns: dict[str, None]) -> dict[str, Any]:
    return _json_row(parse_json(line), columns)


def _json_row(row: Any, columns: dict[str, None]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {repr(row)[:40]}")
    columns.update(dict.fromkeys(row))
    return _present(row)


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and value != ""}


def _json_rows(
    path: Path, columns: dict[str, None], choices: Mapping[str, str], also: frozenset[str]
) -> Iterator[tuple[int, Row]]:
    try:
        content = parse_json(read_text(path, limit=_JSON_BYTES).removeprefix("\ufeff"))
    except DataError as error:
        raise DataError(
            f"{path}: {error.problem}", remedy="if it holds one object a line, call it .jsonl"
        ) from None
    if not isinstance(content, list):
        what = f"an object of {', '.join(f'`{key}`' for key in list(content)[:6])}" * isinstance(
            content, dict
        )
        raise DataError(
            f"{path}: this file holds {what or repr(content)[:40]}",
            expected='a list of objects, [{"video": ..., "caption": ...}, ...]',
            remedy="of a dict of lists, pandas.DataFrame(...).to_json(PATH, orient='records') makes one",
        )
    for number, row in enumerate(content, 1):
        yield number, _row_or_fault(_json_row, row, columns)


def _csv_rows(
    path: Path, columns: dict[str, None], choices: Mapping[str, str], also: frozenset[str]
) -> Iterator[tuple[int, Row]]:
    lines = (line for _, line in read_lines(path))
    header = next(lines, "")
    delimiter = _delimiter(header, "\t,;" if path.suffix.lower() == ".tsv" else ",;\t", choices)
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter)
    try:
        names = next(reader, [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the column `{twice[0]}` stands in the header more than once")
        columns.update(dict.fromkeys(names))
        for cells in reader:
            if len(cells) > len(names):
                yield reader.line_num, DataError("more cells than the header has columns")
            elif cells:
                yield reader.line_num, _present(dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: {error}", remedy="look for a quote that is not closed"
        ) from None


def _delimiter(header: str, candidates: str, choices: Mapping[str, str]) -> str:
    """Returns the delimiter of the cells: the first candidate that separates a video column in the header."""
    video_names = {choices["video"]} if "video" in choices else {"video", *COMMON["video"]}
    for sign in candidates:
        names = next(csv.reader([header], delimiter=sign), [])
        if video_names & {variant for name in names for variant in (name, name.strip().lower())}:
            return sign
    return max(candidates, key=header.count)


def _parquet_rows(
    path: Path, columns: dict[str, None], choices: Mapping[str, str], also: frozenset[str]
) -> Iterator[tuple[int, Row]]:
    import_pyarrow(path)
    from pyarrow import parquet

    with open_regular(path) as file:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        columns.update(dict.fromkeys(names))
        if table.metadata.num_rows > MAX_ROWS:
            raise DataError(f"{path}: more than {MAX_ROWS:,} rows", remedy="divide it into several manifests")
        needed = list(find_columns(names, choices, place=str(path)).values())
        needed += [name for name in names if name in also and name not in needed]
        number = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=needed) if needed else ():
            for row in checked_rows(batch, place=path):
                number += 1
                yield number, _present(row)


_READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
