"""Where clips and captions come from: a folder, or a manifest. Both give the same sorted list of records."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sat_train.data.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Span
from sat_train.errors import DataError
from sat_train.log import get_logger

log = get_logger(__name__)

MAX_CAPTION_CHARS = 20_000
_SHOWN = 10  # names in one message


@dataclass(frozen=True)
class ClipRecord:
    """One clip of a set.

    Args:
        clip_id: Name for messages and for the fingerprint: the path below the set's root, and the part taken.
        path: The file, absolute.
        captions: One or several texts for it; a sample takes one of them.
        start: Begin of the part to use, in seconds from the first frame; None: from the beginning.
        end: End of the part; None: to the end.
        image: File of the image that conditions the clip; None: its first frame is it.
        weight: How often an epoch takes the clip, on average.
        span: Bytes of `path` that hold the clip; None: all of them.
    """

    clip_id: str
    path: Path
    captions: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    image: Path | None = None
    weight: float = 1.0
    span: Span | None = None


@dataclass(frozen=True)
class ClipSource:
    """The clips of one entry of `args.train_data`, sorted by name.

    Args:
        name: The entry, as the person wrote it.
        records: The clips.
        fingerprint: Hash of what they are: names, file sizes, captions, parts and weights.
        ignored: Files that were found and are no clips, by suffix.
    """

    name: str
    records: tuple[ClipRecord, ...]
    fingerprint: str
    ignored: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def clip(self, index: int) -> ClipRecord:
        return self.records[index]

    def with_records(self, records: Sequence[ClipRecord]) -> ClipSource:
        """Returns the source with some of its clips, or with parts of them."""
        if tuple(records) == self.records:
            return self
        told = [[record.clip_id, record.start, record.end] for record in records]
        return replace(self, records=tuple(records), fingerprint=_hash([self.fingerprint, told]))


def _make_source(name: str, records: Sequence[ClipRecord], ignored: Counter[str] | None = None) -> ClipSource:
    told = [_told(record) for record in records]
    return ClipSource(name, tuple(records), _hash(told), tuple(sorted((ignored or {}).items())))


def _told(record: ClipRecord) -> list[Any]:
    size = record.path.stat().st_size if record.path.is_file() else None
    image = record.image and record.image.name
    return [record.clip_id, size, record.captions, record.start, record.end, image, record.weight]


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def read_source(path: str | Path) -> ClipSource:
    """Reads a folder or a manifest, whichever is there.

    Raises:
        DataError: There is nothing at `path`, no clip in it, or a clip without caption.
    """
    place = Path(path)
    if place.is_dir():
        return read_folder(place)
    if place.is_file():
        return read_manifest(place)
    raise DataError(
        f"{path}: there is no such folder or file",
        expected="a folder with videos/ and labels/, or a manifest (.jsonl, .csv, .parquet)",
        remedy="correct args.train_data or args.valid_data",
    )


def read_folder(root: Path) -> ClipSource:
    """Reads a folder of clips at any depth.

    The caption of `.../videos/a/b.mp4` is `.../labels/a/b.txt`: the last folder called `videos` is
    exchanged, no other. Where that file does not exist it is `b.txt` beside the clip. An image under
    `videos/` is a clip of one frame; `.../images/a/b.png` conditions the clip `.../videos/a/b.mp4`.

    Raises:
        DataError: There is no clip, or clips have no caption (all of them are counted, the first ten named).
    """
    files, ignored = _clip_files(root.absolute())
    if not files:
        raise DataError(
            f"{root}: there is no clip in this folder",
            expected=f"videos/NAME.mp4 with labels/NAME.txt; suffixes {' '.join(VIDEO_SUFFIXES)}",
            remedy=f"correct the path. Other files found: {dict(ignored) or 'none'}",
        )
    records, faults = [], []
    for path in files:
        try:
            caption = read_caption(_caption_file(path))
        except DataError as error:
            faults.append(f"{path}: {error.problem}")
            continue
        clip_id = path.relative_to(root.absolute()).as_posix()
        records.append(ClipRecord(clip_id, path, (caption,), image=_image_beside(path)))
    _check_faults(faults, f"{root}: {len(faults)} of {len(files)} clips have no usable caption")
    return _make_source(str(root), records, ignored)


def read_caption(path: Path) -> str:
    """Reads a caption file: UTF-8, with or without byte order mark; several lines are joined by spaces.

    Raises:
        DataError: It is missing, empty, too long or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no caption file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"caption file {path} is not UTF-8 (byte {error.start})") from None
    return clean_caption(text, str(path))


def clean_caption(text: str, place: str) -> str:
    """Joins lines and runs of blanks by one space (the tokenizer sees no difference).

    Raises:
        DataError: The caption is empty or too long.
    """
    caption = " ".join(text.split())
    if not caption:
        raise DataError(f"the caption in {place} is empty")
    if len(caption) > MAX_CAPTION_CHARS:
        raise DataError(
            f"the caption in {place} has {len(caption)} characters, more than {MAX_CAPTION_CHARS}"
        )
    return caption


def _clip_files(root: Path) -> tuple[list[Path], Counter[str]]:
    """Returns the sorted clips under a folder, links followed, and a count of the other files by suffix."""
    files, ignored, seen = [], Counter(), set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below_videos = "videos" in Path(folder).parts
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in VIDEO_SUFFIXES or (suffix in IMAGE_SUFFIXES and below_videos):
                files.append(Path(folder, name))
            elif suffix != ".txt" and suffix not in IMAGE_SUFFIXES:
                ignored[suffix or "(none)"] += 1
    return sorted(files), ignored


def _sibling(path: Path, folder: str, suffix: str) -> Path:
    """Returns the path with its last folder called `videos` exchanged, and another suffix."""
    parts = list(path.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "videos":
            parts[i] = folder
            break
    return Path(*parts).with_suffix(suffix)


def _caption_file(path: Path) -> Path:
    label, beside = _sibling(path, "labels", ".txt"), path.with_suffix(".txt")
    return beside if beside.is_file() and not label.is_file() else label


def _image_beside(path: Path) -> Path | None:
    if "videos" not in path.parts[:-1]:
        return None
    candidates = (_sibling(path, "images", suffix) for suffix in IMAGE_SUFFIXES)
    return next((image for image in candidates if image.is_file()), None)


def _check_faults(faults: Sequence[str], problem: str) -> None:
    if not faults:
        return
    more = f"\n    and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise DataError(
        problem + ":" + "".join(f"\n    {fault}" for fault in faults[:_SHOWN]) + more,
        expected="one caption in UTF-8 for each clip",
        remedy="write the captions, or move these clips away",
    )


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
            records.append(_record(row, path.absolute().parent))
        except DataError as error:
            faults.append(f"{path}:{line}: {error.problem}")
        unknown.update(set(row) - _COLUMNS)
    _check_faults(faults, f"{path}: {len(faults)} of {len(rows)} rows cannot be used")
    if not records:
        raise DataError(f"{path}: this manifest has no rows", expected="one row for each clip")
    if unknown:
        log.info("%s: columns that mean nothing here: %s", path, ", ".join(sorted(unknown)))
    records.sort(key=lambda record: (record.clip_id, record.captions))
    return _make_source(str(path), records)


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


def _record(row: dict[str, Any], root: Path) -> ClipRecord:
    if not isinstance(row.get("video"), str):
        raise DataError("column `video` is missing")
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


def split_source(source: ClipSource, shares: Sequence[float], part: int) -> ClipSource:
    """Takes one part of a set, by a hash of the names: more clips later do not move the others.

    Args:
        shares: Of training, validation and test, in any unit.
        part: Which of them.
    """
    total, below = sum(shares), sum(shares[:part])
    low, high = below / total, (below + shares[part]) / total

    def place(record: ClipRecord) -> float:
        digest = hashlib.blake2b(record.clip_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    return source.with_records([record for record in source.records if low <= place(record) < high])
