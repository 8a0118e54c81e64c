"""A folder of clips with a caption file for each."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from sat_train.data.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.sources.records import ClipRecord, ClipSource, check_faults, clean_caption, make_source
from sat_train.errors import DataError


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
            _check_name(path)
            caption = read_caption(_caption_file(path))
        except DataError as error:
            faults.append(f"{_shown(path)}: {error.problem}")
            continue
        clip_id = path.relative_to(root.absolute()).as_posix()
        records.append(ClipRecord(clip_id, path, (caption,), image=_image_beside(path)))
    check_faults(faults, f"{root}: {len(faults)} of {len(files)} clips have no usable name and caption")
    return make_source(str(root), records, ignored)


def _check_name(path: Path) -> None:
    """Names go into the log, the fingerprint and the cache, as text."""
    if not _is_text(path):
        raise DataError("its name is no line of text in UTF-8")


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return "\n" not in str(path)


def _shown(path: Path) -> str:
    return str(path) if _is_text(path) else ascii(str(path))


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
