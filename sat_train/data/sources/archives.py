"""Tar archives in WebDataset's layout, indexed once and read at random; nothing is unpacked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sat_train.data.clips.clip_file import Span
from sat_train.data.clips.remote import file_name, is_remote
from sat_train.data.sources.archive_index import index_archives
from sat_train.data.sources.field_places import FieldFinder, member_cells
from sat_train.data.sources.records import (
    DEFAULT_OPTIONS,
    ClipRecord,
    ClipSource,
    FieldFile,
    SourceOptions,
    check_faults,
    make_source,
)
from sat_train.errors import DataError


def read_archives(name: str, paths: Sequence[Path], options: SourceOptions = DEFAULT_OPTIONS) -> ClipSource:
    """Reads plain tar files with members `KEY.mp4` and `KEY.txt`, or `KEY.json` with a `caption` in it.

    The value of a field is the member `KEY.NAME.SUFFIX`; of several, `KEY.NAME_0.SUFFIX` and so on.

    The key is the member's name up to the first dot of its last part. Where there is no video, an image is a
    clip of one frame.

    Args:
        name: The item of `args.train_data`, as the user wrote it.
        paths: The archives, on this machine or remote.
        options: How many clips may be unusable.

    Raises:
        DataError: An archive is broken or compressed, has no clip, or too many clips have no caption.
    """
    paths = [path if is_remote(path) else path.absolute() for path in paths]
    records: list[ClipRecord] = []
    faults: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    finder = FieldFinder(options.fields, place="member KEY.{}.*")
    skipped: Counter[str] = Counter()
    for path, archive, index in zip(paths, _names(paths), index_archives(paths), strict=True):
        for clip in index.clips:
            clip_id, span = f"{archive}/{clip.name}", Span(clip.offset, clip.size)
            members = {
                suffix: FieldFile(path, Span(offset, size), f".{suffix.rpartition('.')[2]}")
                for suffix, offset, size in clip.others
            }
            try:
                cells, used = member_cells(options.fields, members)
                record = ClipRecord(clip_id, path, (clip.caption,), span=span)
                records.append(finder.add(record, cells))
                ignored.update(members.keys() - used)
            except DataError as error:
                faults.append((clip_id, error.problem))
        faults += [(f"{archive}/{clip}", why) for clip, why in index.faults]
        ignored.update(dict(index.ignored))
        skipped.update(dict(index.skipped))
    fields = " and fields" if options.fields else ""
    check_faults(
        faults,
        f"{name}: {len(faults)} of {len(faults) + len(records)} clips have no usable caption{fields}",
        allowed=options.max_bad_fraction * (len(faults) + len(records)),
    )
    if not records:
        raise DataError(f"{name}: there is no clip in these archives", expected="members KEY.mp4 and KEY.txt")
    notes = [f"members that are not read: {what} ({count})" for what, count in sorted(skipped.items())]
    return make_source(name, records, ignored=ignored, notes=notes, faults=faults)


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the archives' file names or, if two are equal, their paths below the common folder."""
    names = [file_name(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    places = [PurePosixPath(str(path)) for path in paths]
    root = os.path.commonpath([place.parent for place in places])
    return [str(place.relative_to(root)) for place in places]
