"""Clips and sources of clips, as every kind of source gives them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sat_train.config.parts.field_parts import FieldConfig
from sat_train.data.clips.clip_file import Span
from sat_train.errors import DataError

MAX_CAPTION_CHARS = 20_000
MAX_ROWS = 10_000_000  # of one table; more is damage, or an attack on memory
MAX_WEIGHT = 1_000_000.0
_MAX_NAME_BYTES = 255  # of one part of a path: what file systems take
_MAX_PATH_BYTES = 4095
_SHOWN = 10  # names in one message


@dataclass(frozen=True)
class SourceOptions:
    """Options for reading the items of `args.train_data` and `args.valid_data`.

    Args:
        columns: Names of a table's columns, by kind (`data.columns`).
        follow_links: Follow links that lead out of a source's folder (`data.follow_links`).
        max_bad_fraction: Share of a source's clips that may be unusable (`data.max_bad_fraction`).
        fields: Further values of each clip, by name (`data.fields`).
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    follow_links: bool = False
    max_bad_fraction: float = 0.0
    fields: Mapping[str, FieldConfig] = field(default_factory=dict)


DEFAULT_OPTIONS = SourceOptions()


@dataclass(frozen=True)
class FieldFile:
    """A file, or a part of one, that holds the value of a field.

    Args:
        path: As in `ClipRecord`.
        span: Likewise.
        suffix: Of its name, in small letters, also where `path` is an archive.
    """

    path: Path
    span: Span | None = None
    suffix: str = ""


@dataclass(frozen=True)
class FieldPlace:
    """The files or the text that hold one field of a clip.

    Args:
        files: Its files.
        value: The value itself, where the source holds it: a text, or numbers as JSON; None: it is in files.
        begins: Where in the clip the field begins, in seconds from the clip's first frame.
    """

    files: tuple[FieldFile, ...] = ()
    value: str | None = None
    begins: float = 0.0

    @property
    def name(self) -> str:
        """Name for messages."""
        return ", ".join(file.path.name for file in self.files) or "in the source"


@dataclass(frozen=True)
class ClipRecord:
    """One clip of a set.

    Args:
        clip_id: Name for messages and for the fingerprint: the path below the set's root, and the part taken.
        path: The file, absolute, or remote (`remote.make_path`).
        captions: One or several texts for it; a sample takes one of them.
        start: Start of the part to use, in seconds from the first frame; None: from the beginning.
        end: End of the part; None: to the end.
        image: File of the image that conditions the clip; None: its first frame.
        weight: How often an epoch takes the clip, on average.
        span: Bytes of `path` that hold the clip; None: all of them.
        fields: Where its further values are found, by the name of the field.
    """

    clip_id: str
    path: Path
    captions: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    image: Path | None = None
    weight: float = 1.0
    span: Span | None = None
    fields: Mapping[str, FieldPlace] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipSource:
    """The clips of one item of `args.train_data`, sorted by name.

    Args:
        name: The item, as the user wrote it.
        records: The clips.
        fingerprint: Hash of names, file sizes, captions, parts, weights and fields.
        ignored: Unused files, by suffix.
        notes: Sentences about other unused files, and about substitutes for missing ones.
        faults: Unusable clips, by name or row, with the reason; few enough to leave out.
        part: Description of the part of its clips that it holds; empty for all.
    """

    name: str
    records: tuple[ClipRecord, ...]
    fingerprint: str
    ignored: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()
    part: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def clip(self, index: int) -> ClipRecord:
        return self.records[index]

    def left_out(self) -> str:
        """Returns a sentence that names the clips that cannot be used."""
        names = name_some((f"{name} ({why})" for name, why in self.faults), limit=5)
        return f"{len(self.faults)} clips or rows are left out: {names}"

    def with_records(self, records: Sequence[ClipRecord]) -> ClipSource:
        """Returns the source with some of its clips, or with parts of them."""
        if tuple(records) == self.records:
            return self
        spans = [[record.clip_id, record.start, record.end] for record in records]
        return replace(self, records=tuple(records), fingerprint=_hash([self.fingerprint, spans]))


def make_source(
    name: str,
    records: Sequence[ClipRecord],
    *,
    ignored: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    faults: Sequence[tuple[str, str]] = (),
) -> ClipSource:
    """Builds a source from clips in any order.

    Args:
        name: The item, as the user wrote it.
        records: Its clips.
        ignored: See `ClipSource`.
        notes: Likewise.
        faults: Likewise.
    """
    records = sorted(records, key=lambda record: (record.clip_id, record.captions))
    described = [_describe(record) for record in records]
    counted = tuple(sorted((ignored or {}).items()))
    return ClipSource(name, tuple(records), _hash(described), counted, tuple(notes), tuple(faults))


def _describe(record: ClipRecord) -> list[Any]:
    image = record.image and record.image.name
    fields = [[name, *_describe_field(place)] for name, place in sorted(record.fields.items())]
    about = [record.captions, record.start, record.end, image, record.weight]
    return [record.clip_id, _size(record.path, record.span), *about, *fields]


def _describe_field(place: FieldPlace) -> list[Any]:
    return [
        [[file.path.name, _size(file.path, file.span)] for file in place.files],
        place.value,
        place.begins,
    ]


def _size(path: Path, span: Span | None) -> int | None:
    if span is not None:
        return span.size
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def clean_caption(text: str, place: str) -> str:
    """Joins lines and runs of blanks by single spaces (the tokenizer sees no difference).

    Raises:
        DataError: The caption is empty, too long, or holds what UTF-8 cannot.
    """
    caption = " ".join(text.split())
    if not caption:
        raise DataError(f"the caption in {place} is empty")
    if len(caption) > MAX_CAPTION_CHARS:
        raise DataError(
            f"the caption in {place} has {len(caption)} characters, more than {MAX_CAPTION_CHARS}"
        )
    if not is_text(caption):
        raise DataError(f"the caption in {place} holds half a surrogate pair, which is not a character")
    return caption


def check_name(name: str) -> None:
    """Refuses names that cannot go into a log, a fingerprint or a file system.

    Raises:
        DataError: Such a name.
    """
    if not is_text(name) or "\n" in name:
        raise DataError("its name is not a line of text in UTF-8")
    if "\0" in name:
        raise DataError("its name holds a NUL character")
    parts = name.encode().split(b"/")
    if len(name.encode()) > _MAX_PATH_BYTES or max(map(len, parts)) > _MAX_NAME_BYTES:
        raise DataError(f"its name has {len(name)} letters, more than any file's")


def is_text(text: str) -> bool:
    """Returns whether UTF-8 can hold a text; other bytes or half of a surrogate pair cannot be held."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str) -> Any:
    """Parses JSON from a stranger.

    Raises:
        DataError: It is none, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"this is not JSON ({error.msg})") from None
    except RecursionError:
        raise DataError("this is not JSON for a table (nested too deeply)") from None
    except ValueError as error:
        raise DataError(f"this is not JSON for a table ({error})") from None


def name_some(names: Iterable[str], *, limit: int = _SHOWN) -> str:
    """Joins names for a message; of many names only the first ones."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_faults(
    faults: Sequence[tuple[str, str]],
    problem: str,
    *,
    allowed: float = 0.0,
    expected: str = "a caption in UTF-8 for each clip, and each field of data.fields",
    remedy: str = "write what is missing, or move these clips away",
) -> None:
    """Raises one error for all faults of a source, which names the first ten.

    Args:
        faults: Names or rows, and the fault of each.
        problem: Summary of the faults.
        allowed: Number of faults that are accepted.
        expected: Description of correct clips.
        remedy: Advice for the user.

    Raises:
        DataError: There are more faults.
    """
    if len(faults) <= allowed:
        return
    more = f"\n    and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    examples = "".join(f"\n    {name}: {why}" for name, why in faults[:_SHOWN])
    raise DataError(f"{problem}:{examples}{more}", expected=expected, remedy=remedy)
