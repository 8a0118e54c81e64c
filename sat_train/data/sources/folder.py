"""Reads a folder of clips, with one caption file per clip or one list of all captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sat_train.data.clips.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.sources.field_places import FieldFinder, field_files
from sat_train.data.sources.listing import Found, Listing, describe, exchange_folder
from sat_train.data.sources.lists import CAPTION_LISTS, VIDEO_LIST, find_lists, read_lists
from sat_train.data.sources.records import (
    DEFAULT_OPTIONS,
    ClipRecord,
    ClipSource,
    SourceOptions,
    check_faults,
    check_name,
    clean_caption,
    is_text,
    make_source,
    name_some,
)
from sat_train.errors import DataError
from sat_train.files import read_bytes

_CAPTION_BYTES = 1 << 20  # read at most: 20,000 characters, and blanks around them
_COPY = re.compile(r"_\d+$")  # of the files of a field of kind `pair`
_MANY_PICTURES = 8  # of one folder look like the frames of a clip


def read_folder(root: Path, options: SourceOptions = DEFAULT_OPTIONS) -> ClipSource:
    """Reads a folder of clips at any depth.

    The caption of `.../videos/a/b.mp4` is `.../labels/a/b.txt`: only the last folder called `videos` is
    replaced. If that file does not exist, it is `b.txt` next to the clip. An image under `videos/` is a clip
    of one frame; `.../images/a/b.png` conditions the clip `.../videos/a/b.mp4`. If no clip has a caption of
    its own, `videos.txt` and `prompt.txt` hold them line by line.

    A video without caption in a folder next to `videos`, which has the name of a clip there, is a field that
    `data.fields` does not name, and no clip. Every other file is counted, and named if it may have been meant
    to be used.

    Raises:
        DataError: There is no clip, more clips than allowed have no caption (all of them are counted, the
            first ten named), or links lead out of the folder.
    """
    place = root.absolute()
    listing = Listing(place, options)
    files = listing.walk()
    pairs = [_pair(listing, path) for path in files.clips]
    lists = find_lists(place, files.texts, options.fields)
    if lists.complete and not any(pair.caption for pair in pairs):
        listing.check_links()
        return read_lists(root, listing, files, lists.complete, options)
    if not pairs:
        raise DataError(
            f"{root}: there is no clip in this folder",
            expected=f"videos/NAME.mp4 with labels/NAME.txt, or {VIDEO_LIST} with {CAPTION_LISTS[0]}; "
            f"suffixes {' '.join(VIDEO_SUFFIXES)}",
            remedy=f"correct the path. {_other_files(place, files)}{_frames_hint(files)}",
        )
    listing.check_links()
    undeclared = _undeclared_fields(place, pairs)
    pairs = [pair for pair in pairs if pair.clip not in undeclared]
    finder = FieldFinder(options.fields, place, listing)
    records, faults = [], []
    for pair in pairs:
        try:
            name = pair.clip.relative_to(place).as_posix()
            check_name(name)
            captions = (read_caption(pair.caption, pair.expected),)
            records.append(finder.add(ClipRecord(name, pair.clip, captions, image=pair.image)))
        except DataError as error:
            faults.append((_shown(pair.clip), error.problem))
    listing.check_links()
    check_faults(
        faults,
        f"{root}: {len(faults)} of {len(pairs)} clips have no usable {_wanted(options)}",
        allowed=options.max_bad_fraction * len(pairs),
        remedy=f"write what is missing, or move these clips away{lists.hint()}{_frames_hint(files)}"
        f"{_fields_hint(place, files.clips)}",
    )
    if not records:
        raise DataError(f"{root}: no clip of this folder can be used", expected="clips with captions")
    used = {path for pair in pairs for path in (pair.caption, pair.image) if path} | field_files(records)
    notes = [*_missing_images(place, pairs), *_undeclared_notes(undeclared), *files.notes(place, used)]
    return make_source(str(root), records, ignored=files.unused(used), notes=notes, faults=faults)


@dataclass(frozen=True)
class _Pair:
    """A clip with its caption and image; `expected` is the place of its caption."""

    clip: Path
    caption: Path | None
    expected: Path
    image: Path | None


def _pair(listing: Listing, clip: Path) -> _Pair:
    listing.use(clip)
    label = listing.find_beside(clip, "labels", (".txt",))
    caption = label or listing.find(clip.with_suffix(""), (".txt",))
    expected = exchange_folder(clip, "labels")[0].with_name(f"{clip.stem}.txt")
    return _Pair(clip, caption, expected, listing.find_beside(clip, "images", IMAGE_SUFFIXES))


def _undeclared_fields(root: Path, pairs: Sequence[_Pair]) -> dict[Path, str]:
    """Returns the files of fields that no setting names, each with its folder; see `read_folder`."""
    clips = {_name(root, pair.clip) for pair in pairs if pair.caption}
    undeclared = {}
    for pair in pairs:
        *folders, stem = _name(root, pair.clip)
        if pair.caption or "videos" in folders:
            continue
        for index, folder in enumerate(folders):
            place = (*folders[:index], "videos", *folders[index + 1 :])
            if (*place, stem) in clips or (*place, _COPY.sub("", stem)) in clips:
                undeclared[pair.clip] = folder
    return undeclared


def _name(root: Path, clip: Path) -> tuple[str, ...]:
    return clip.relative_to(root).with_suffix("").parts


def _undeclared_notes(undeclared: Mapping[Path, str]) -> list[str]:
    return [
        f"{count} videos in {folder}/ have the names of clips in videos/ and no captions, and are no clips: "
        f"to use them, declare data.fields.{folder}"
        for folder, count in sorted(Counter(undeclared.values()).items())
    ]


def _shown(path: Path) -> str:
    return str(path) if is_text(str(path)) and "\n" not in str(path) else ascii(str(path))


def read_caption(path: Path | None, expected: Path) -> str:
    """Reads a caption file: UTF-8, with or without byte order mark; several lines are joined by spaces.

    Args:
        path: The file; None: there is none.
        expected: Where it should be.

    Raises:
        DataError: It is missing, empty, too long, not UTF-8, or not a regular file.
    """
    if path is None:
        raise DataError(f"there is no caption file {expected}")
    try:
        text = read_bytes(path, limit=_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"caption file {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"caption file {path} {error.strerror or error}") from None
    return clean_caption(text, str(path))


def _missing_images(root: Path, pairs: Sequence[_Pair]) -> list[str]:
    """Returns a note that names clips without an image, which use their first frame, if others have one."""
    clips = [pair for pair in pairs if pair.clip.suffix.lower() in VIDEO_SUFFIXES]
    without = [pair.clip for pair in clips if pair.image is None]
    if len(without) == len(clips):
        return []
    return describe(root, "clips have no image in images/ (their first frame is the condition)", without)


def _other_files(root: Path, files: Found) -> str:
    counts = files.unused(set())
    names = name_some(path.relative_to(root).as_posix() for path in sorted([*files.pictures, *files.texts]))
    counted = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    pictures = "; pictures are clips of one frame in a folder `videos`" if files.pictures else ""
    return f"Other files found: {counted or 'none'}" + (f" ({names})" if names else "") + pictures


def _frames_hint(files: Found) -> str:
    """Returns a hint that folders of frames are not read, if there seem to be some."""
    clips = (path for path in files.clips if path.suffix.lower() in IMAGE_SUFFIXES)
    folders = Counter(path.parent for path in _numbered([*files.pictures, *clips]))
    frames = [folder for folder, count in folders.items() if count >= _MANY_PICTURES]
    if not frames:
        return ""
    return f". Folders of frames ({frames[0].name}, ...) are not read: make a video file of each"


def _wanted(options: SourceOptions) -> str:
    return "name, caption and fields" if options.fields else "name and caption"


def _fields_hint(root: Path, clips: Sequence[Path]) -> str:
    """Returns a hint that folders next to `videos` hold fields, if there are some."""
    folders = dict.fromkeys(path.relative_to(root).parts[0] for path in clips if path.parent != root)
    others = [name for name in folders if name != "videos"]
    if "videos" not in folders or not others:
        return ""
    return f". Folders next to videos/ ({name_some(others)}) hold fields if data.fields names them"


def _numbered(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.stem[-1:].isdigit()]
