"""Reads Hugging Face datasets on disk in place: no copy, no `datasets` package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sat_train.data.clips.clip_file import Span
from sat_train.data.sources.arrow import checked_rows, import_pyarrow
from sat_train.data.sources.clip_manifest import canonical_row, cells_of, make_record, unused_columns
from sat_train.data.sources.columns import check_columns, find_columns
from sat_train.data.sources.field_places import FieldFinder, columns_of
from sat_train.data.sources.links import check_links
from sat_train.data.sources.records import (
    DEFAULT_OPTIONS,
    MAX_ROWS,
    ClipRecord,
    ClipSource,
    FieldFile,
    SourceOptions,
    check_faults,
    make_source,
)
from sat_train.errors import DataError
from sat_train.files import open_regular, read_text, reading

_STATE = "state.json"
_STATE_BYTES = 16 << 20


def is_hf_dataset(folder: Path) -> bool:
    """Returns whether `Dataset.save_to_disk` wrote this folder."""
    return (folder / _STATE).is_file() and (folder / "dataset_info.json").is_file()


def read_hf_dataset(folder: Path, options: SourceOptions = DEFAULT_OPTIONS) -> ClipSource:
    """Reads a dataset that `Dataset.save_to_disk` wrote, with a manifest's columns.

    `video` is a path or holds the file itself (`Video` or binary). Such a file is found by its place in the
    Arrow file, and workers read it from there.

    Raises:
        DataError: There is no pyarrow, rows were selected or shuffled without rewriting, files are
            damaged, or more rows are unusable than allowed.
    """
    records: list[ClipRecord] = []
    faults: list[tuple[str, str]] = []
    notes: dict[str, None] = {}
    number = 0
    finder = FieldFinder(options.fields, folder.absolute())
    for file in _data_files(folder, options):
        path = folder.absolute() / file
        for columns, by_kind, row, spans in _rows(path, options):
            own = columns_of(options.fields, columns)
            used = (*by_kind.values(), *own.values())
            notes.update(dict.fromkeys(unused_columns(columns, used)))
            try:
                record = _record(canonical_row(row, by_kind), spans.get(by_kind["video"]), path, number)
                records.append(finder.add(record, _with_spans(cells_of(row, own), own, spans, path)))
            except DataError as error:
                faults.append((f"row {number}", error.problem))
            number += 1
            if number > MAX_ROWS:
                raise DataError(f"{folder}: more than {MAX_ROWS:,} rows")
    allowed = options.max_bad_fraction * number
    check_faults(faults, f"{folder}: {len(faults)} of {number} rows cannot be used", allowed=allowed)
    if not records:
        raise DataError(f"{folder}: this dataset has no rows", expected="one row for each clip")
    return make_source(str(folder), records, notes=tuple(notes), faults=faults)


def _data_files(folder: Path, options: SourceOptions) -> list[str]:
    """Returns the names of the Arrow files, all of them in the folder itself."""
    path = folder / _STATE
    with reading(path, error=DataError, expected="what `Dataset.save_to_disk` writes"):
        state = json.loads(read_text(path, limit=_STATE_BYTES))
        names = [file["filename"] for file in state["_data_files"]]
        strays = [name for name in names if Path(name).name != name]
    if strays:
        raise DataError(f"{path}: it names {strays[0]!r}", expected="files in the same folder")
    if state.get("_indices_files"):
        raise DataError(
            f"{folder}: this dataset is a selection of the rows in its files",
            expected="the rows themselves",
            remedy="dataset.flatten_indices().save_to_disk(...)",
        )
    check_links(folder, [folder / name for name in (_STATE, *names)], options)
    return names


def _record(row: dict[str, Any], span: Span | None, file: Path, number: int) -> ClipRecord:
    """Builds a record whose clip is a file or a part of an Arrow file."""
    if span is None:
        return make_record(row, file.parent)
    name = f"row-{number:06d}" + (f"/{Path(row['video']).name}" if isinstance(row["video"], str) else "")
    return replace(make_record({**row, "video": name}, file.parent), path=file, span=span)


def _with_spans(
    cells: dict[str, Any], columns: Mapping[str, str], spans: Mapping[str, Span], path: Path
) -> dict[str, Any]:
    """Returns the cells of fields, with files in place of those that hold a file's bytes."""
    return {
        name: cell
        if columns[name] not in spans
        else FieldFile(path, spans[columns[name]], Path(str(cell)).suffix.lower())
        for name, cell in cells.items()
    }


_Row = tuple[tuple[str, ...], dict[str, str], dict[str, Any], dict[str, Span]]


def _rows(path: Path, options: SourceOptions) -> Iterator[_Row]:
    """Yields columns, their meaning, a row without the bytes of files, and the positions of these in the
    Arrow file, by column.

    The value of a file that has no name of its own is True.
    """
    pa = import_pyarrow(path)
    with reading(path, error=DataError, expected="an Arrow file as `Dataset.save_to_disk` writes it"):
        open_regular(path).close()
        with pa.memory_map(str(path)) as mapped:
            base, size = mapped.read_buffer().address, mapped.size()
            mapped.seek(0)
            for batch in pa.ipc.open_stream(mapped):
                columns = tuple(batch.schema.names)
                by_kind = find_columns(columns, options.columns, place=str(path))
                check_columns(by_kind, columns, place=str(path))
                own = set(columns_of(options.fields, columns).values())
                used = batch.select(sorted({*by_kind.values(), *own}))
                for row, spans in _batch_rows(used, by_kind["video"], own, base, size, path):
                    yield columns, by_kind, row, spans


def _batch_rows(
    batch: Any, video: str, fields: AbstractSet[str], base: int, size: int, path: Path
) -> list[tuple[dict[str, Any], dict[str, Span]]]:
    """Returns the rows of a batch. Arrow trusts offsets, so they are checked before anything is read."""
    files = [
        name
        for name in batch.schema.names
        if name in {video, *fields} and _holds_files(batch.column(name).type, must=name == video)
    ]
    rows = checked_rows(batch.select([n for n in batch.schema.names if n not in files]), place=path)
    spans: list[dict[str, Span]] = [{} for _ in rows]
    for name in files:
        found = _file_column(batch.column(name), base, size, path)
        for row, own, (text, span) in zip(rows, spans, found, strict=True):
            row[name] = text if text is not None or span is None else True
            if span is not None:
                own[name] = span
    return [(_present(row), own) for row, own in zip(rows, spans, strict=True)]


def _holds_files(kind: Any, *, must: bool) -> bool:
    """Returns whether a column holds the bytes of files; one that must hold files or paths does otherwise."""
    import pyarrow.types as types

    if types.is_string(kind) or types.is_large_string(kind):
        return False
    return must or bool(types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _file_column(data: Any, base: int, size: int, path: Path) -> list[tuple[str | None, Span | None]]:
    """Returns name and position of each file in a column."""
    import pyarrow as pa

    data.validate(full=True)
    names = [None] * len(data)
    if pa.types.is_struct(data.type):
        table = pa.RecordBatch.from_arrays([data.field("path")], ["path"])
        names = [row["path"] for row in checked_rows(table, place=path)]
        data = data.field("bytes")
    return list(zip(names, _spans(data, base, size, path), strict=True))


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _spans(data: Any, base: int, size: int, path: Path) -> list[Span | None]:
    """Returns the positions of a binary column's values in the mapped file."""
    import pyarrow as pa

    wide = pa.types.is_large_binary(data.type)
    if not wide and not pa.types.is_binary(data.type):
        raise DataError(
            f"{path}: the videos have the type {data.type}", expected="paths, or the bytes of files"
        )
    _, offsets, values = data.buffers()
    edges = np.frombuffer(offsets, np.int64 if wide else np.int32)[data.offset : data.offset + len(data) + 1]
    start = 0 if values is None else values.address - base
    if len(edges) and not (start + int(edges[0]) >= 0 and start + int(edges[-1]) <= size):
        raise DataError(
            f"{path}: its values do not lie in the file as they are (compressed buffers?)",
            expected="an Arrow file without compression, so that clips can be read at random",
        )
    present = data.is_valid().to_pylist()
    return [
        Span(start + int(begin), int(end - begin)) if is_there else None
        for begin, end, is_there in zip(edges[:-1], edges[1:], present, strict=True)
    ]
