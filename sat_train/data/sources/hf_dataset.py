"""Hugging Face datasets on disk, read where they lie: no copy, no `datasets` package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sat_train.data.clip_file import Span
from sat_train.data.sources.manifest import make_record
from sat_train.data.sources.records import ClipRecord, ClipSource, check_faults, make_source
from sat_train.errors import DataError

_STATE = "state.json"


def is_hf_dataset(folder: Path) -> bool:
    """Tells whether `Dataset.save_to_disk` wrote this folder."""
    return (folder / _STATE).is_file() and (folder / "dataset_info.json").is_file()


def read_hf_dataset(folder: Path) -> ClipSource:
    """Reads a dataset that `Dataset.save_to_disk` wrote, with a manifest's columns.

    `video` is a path or holds the file itself (`Video` or binary). Such a file is found by its place in the
    Arrow file, and workers read it from there.

    Raises:
        DataError: There is no pyarrow, rows were selected or shuffled without rewriting, or are unusable.
    """
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if state.get("_indices_files"):
        raise DataError(
            f"{folder}: this dataset is a selection of the rows in its files",
            expected="the rows themselves",
            remedy="dataset.flatten_indices().save_to_disk(...)",
        )
    records: list[ClipRecord] = []
    faults: list[str] = []
    number = 0
    for file in state["_data_files"]:
        for row, span in _rows(folder.absolute() / file["filename"]):
            try:
                records.append(_record(row, span, folder.absolute(), folder / file["filename"], number))
            except DataError as error:
                faults.append(f"row {number}: {error.problem}")
            number += 1
    check_faults(faults, f"{folder}: {len(faults)} of {number} rows cannot be used")
    if not records:
        raise DataError(f"{folder}: this dataset has no rows", expected="one row for each clip")
    return make_source(str(folder), records)


def _record(row: dict[str, Any], span: Span | None, root: Path, file: Path, number: int) -> ClipRecord:
    """Makes a record whose clip is a file of its own or a part of an Arrow file."""
    if span is None:
        return make_record(row, root)
    name = f"row-{number:06d}" + (f"/{Path(row['video']).name}" if row.get("video") else "")
    return replace(make_record({**row, "video": name}, root), path=file.absolute(), span=span)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], Span | None]]:
    """Yields the columns of each row without the video's bytes, and where in the file these lie."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path}: reading Arrow files needs pyarrow", remedy="pip install pyarrow") from None
    with pa.memory_map(str(path)) as mapped:
        base = mapped.read_buffer().address
        mapped.seek(0)
        for batch in pa.ipc.open_stream(mapped):
            if "video" not in batch.schema.names:
                raise DataError(f"{path}: there is no column `video`", expected="the columns of a manifest")
            video = batch.column("video")
            data, names = video, None
            if pa.types.is_struct(video.type):
                data, names = video.field("bytes"), video.field("path").to_pylist()
            spans = _spans(data, base)
            others = batch.drop_columns(["video"]).to_pylist()
            for i, row in enumerate(others):
                shown = {key: value for key, value in row.items() if value is not None}
                name = names[i] if names else (data[i].as_py() if spans is None else None)
                yield ({**shown, "video": name} if name is not None else shown), spans and spans[i]


def _spans(data: Any, base: int) -> list[Span | None] | None:
    """Returns where the values of a binary column lie in the mapped file; None for a column of texts."""
    import pyarrow as pa

    wide = pa.types.is_large_binary(data.type)
    if not wide and not pa.types.is_binary(data.type):
        return None
    _, offsets, values = data.buffers()
    edges = np.frombuffer(offsets, np.int64 if wide else np.int32)[data.offset : data.offset + len(data) + 1]
    start = 0 if values is None else values.address - base
    present = data.is_valid().to_pylist()
    return [
        Span(start + int(begin), int(end - begin)) if is_there else None
        for begin, end, is_there in zip(edges[:-1], edges[1:], present, strict=True)
    ]
