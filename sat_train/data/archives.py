"""Tar archives in WebDataset's layout, indexed once and read at random; nothing is unpacked."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sat_train.data.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Span
from sat_train.data.records import ClipRecord, ClipSource, check_faults, clean_caption, make_source
from sat_train.errors import DataError

_MAX_TEXT_BYTES = 1 << 20


def read_archives(name: str, paths: Sequence[Path]) -> ClipSource:
    """Reads the members of plain tar files: `KEY.mp4` with `KEY.txt`, or `KEY.json` with a `caption` in it.

    The key is the member's name up to the first dot of its last part. Where there is no video, an image is a
    clip of one frame.

    Args:
        name: The entry, as the person wrote it.
        paths: The archives.

    Raises:
        DataError: An archive is broken or compressed, has no clip, or clips have no caption.
    """
    records: list[ClipRecord] = []
    faults: list[str] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        for key, members in _members(path.absolute()).items():
            _read_sample(path.absolute(), key, members, records, faults, ignored)
    check_faults(
        faults, f"{name}: {len(faults)} of {len(faults) + len(records)} clips have no usable caption"
    )
    if not records:
        raise DataError(f"{name}: there is no clip in these archives", expected="members KEY.mp4 and KEY.txt")
    return make_source(name, records, ignored)


def _members(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Returns the regular files of an archive by key and suffix."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isreg() and not member.issparse() and not name.name.startswith("."):
                    stem, _, suffix = name.name.partition(".")
                    samples.setdefault(str(name.parent / stem), {})[f".{suffix.lower()}"] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: this archive cannot be read: {error}",
            expected="a complete tar file without compression, so that its members can be read at random",
        ) from None
    return samples


def _read_sample(
    path: Path,
    key: str,
    members: dict[str, tarfile.TarInfo],
    records: list[ClipRecord],
    faults: list[str],
    ignored: Counter[str],
) -> None:
    """Adds the clip of one key to the records, or its fault to the faults."""
    suffix = next((s for kind in (VIDEO_SUFFIXES, IMAGE_SUFFIXES) for s in kind if s in members), None)
    if suffix is None:
        ignored.update(list(members))
        return
    clip = members[suffix]
    try:
        caption = _caption(path, members)
    except DataError as error:
        faults.append(f"{path.name}/{clip.name}: {error.problem}")
        return
    span = Span(clip.offset_data, clip.size)
    records.append(ClipRecord(f"{path.name}/{clip.name}", path, (caption,), span=span))


def _caption(path: Path, members: dict[str, tarfile.TarInfo]) -> str:
    if ".txt" in members:
        return clean_caption(_text(path, members[".txt"]), ".txt")
    if ".json" not in members:
        raise DataError("there is no .txt and no .json beside it")
    try:
        told = json.loads(_text(path, members[".json"]))
    except json.JSONDecodeError as error:
        raise DataError(f"its .json is no JSON ({error.msg})") from None
    caption = told.get("caption") if isinstance(told, dict) else None
    if not isinstance(caption, str):
        raise DataError("its .json has no `caption`")
    return clean_caption(caption, ".json")


def _text(path: Path, member: tarfile.TarInfo) -> str:
    if member.size > _MAX_TEXT_BYTES:
        raise DataError(f"{member.name} has {member.size} bytes")
    with path.open("rb") as file:
        file.seek(member.offset_data)
        try:
            return file.read(member.size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{member.name} is not UTF-8 (byte {error.start})") from None
