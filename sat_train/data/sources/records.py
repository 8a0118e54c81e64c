"""A clip of a set, and a set of clips: what every kind of source gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sat_train.data.clip_file import Span
from sat_train.errors import DataError

MAX_CAPTION_CHARS = 20_000
_SHOWN = 10  # names in one message


@dataclass(frozen=True)
class ClipRecord:
    """One clip of a set.

    Args:
        clip_id: Name for messages and for the fingerprint: the path below the set's root, and the part taken.
        path: The file, absolute, or remote (`remote.make_path`).
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


def make_source(
    name: str, records: Sequence[ClipRecord], ignored: Mapping[str, int] | None = None
) -> ClipSource:
    """Makes a source of clips in any order.

    Args:
        name: The entry, as the person wrote it.
        records: Its clips.
        ignored: Files that are no clips, by suffix.
    """
    records = sorted(records, key=lambda record: (record.clip_id, record.captions))
    told = [_told(record) for record in records]
    return ClipSource(name, tuple(records), _hash(told), tuple(sorted((ignored or {}).items())))


def _told(record: ClipRecord) -> list[Any]:
    size = record.span.size if record.span else _size(record.path)
    image = record.image and record.image.name
    return [record.clip_id, size, record.captions, record.start, record.end, image, record.weight]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


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


def check_faults(
    faults: Sequence[str],
    problem: str,
    *,
    expected: str = "one caption in UTF-8 for each clip",
    remedy: str = "write the captions, or move these clips away",
) -> None:
    """Raises one error for all the faults of a source, the first ten of them named."""
    if not faults:
        return
    more = f"\n    and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise DataError(
        problem + ":" + "".join(f"\n    {fault}" for fault in faults[:_SHOWN]) + more,
        expected=expected,
        remedy=remedy,
    )
