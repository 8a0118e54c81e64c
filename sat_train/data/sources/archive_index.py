"""Indexes tar archives from their headers alone; indexes of remote archives are kept between runs."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from sat_train.data.clips.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.clips.part_reader import ReadableFile
from sat_train.data.clips.remote import RemoteFile, RemoteState, is_remote, public_url, read_state
from sat_train.data.sources.columns import COMMON, find_columns, shown_columns
from sat_train.data.sources.records import check_name, clean_caption, parse_json
from sat_train.errors import DataError
from sat_train.files import open_regular, read_text, write_text
from sat_train.json_record import JsonRecord, read_record
from sat_train.log import get_logger

log = get_logger(__name__)

_FORMAT = 3  # raise it when the same archive begins to give another index
_MAX_TEXT_BYTES = 1 << 20
_MAX_HEADER_BYTES = 4 << 20  # of one read: a long name or a text, which tarfile reads as a whole
_INDEX_BYTES = 1 << 30  # of a remembered index
_NUM_THREADS = 16
# Of one request while indexing: the rest of one clip's header, its caption and the next clip's header fit.
_BLOCK_BYTES = 1 << 15


@dataclass(frozen=True)
class Member(JsonRecord):
    """One clip of an archive.

    Args:
        name: Name of the member.
        offset: Position of its first byte.
        size: Size in bytes.
        caption: Caption of the clip.
        others: Further members of its key: suffix, position and size of each.
    """

    name: str
    offset: int
    size: int
    caption: str
    others: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class ArchiveIndex(JsonRecord):
    """Contents of an archive.

    Args:
        clips: Clips in the order of their first members.
        faults: Clips without a usable caption, by name, with the reason.
        ignored: Members of no clip, by suffix.
        skipped: Number of members that are not read, by kind.
    """

    clips: tuple[Member, ...]
    faults: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, int], ...]
    skipped: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _SavedIndex(JsonRecord):
    """An index between two runs: `key` is the state of its archive, `sha256` the hash of the index."""

    key: dict[str, Any]
    sha256: str
    index: ArchiveIndex


@dataclass(frozen=True)
class _File:
    """A regular member; `text` is the content of a caption file."""

    name: str
    offset: int
    size: int
    text: bytes | None


def index_archives(paths: Sequence[Path]) -> list[ArchiveIndex]:
    """Indexes archives, several in parallel.

    Raises:
        DataError: One is missing, broken or compressed, or its storage does not answer.
    """
    with ThreadPoolExecutor(max(1, min(_NUM_THREADS, len(paths)))) as pool:
        return list(pool.map(_index, paths))


def _index(path: Path) -> ArchiveIndex:
    if not is_remote(path):
        return _sort(*_read_members(path))
    with _readable(path):
        state = read_state(path)
    saved_index = _recall(path, state)
    if saved_index is not None:
        return saved_index
    index = _sort(*_read_members(path))
    with _readable(path):
        if read_state(path) != state:
            raise OSError("it was changed while it was read")
    _remember(path, state, index)
    return index


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Converts any error with an archive into one that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            f"{public_url(path)}: there is no such archive", remedy="correct args.train_data"
        ) from None
    except DataError:
        raise
    except Exception as error:  # tarfile fails in as many ways as there are broken headers
        raise DataError(
            f"{public_url(path)}: this archive cannot be read: {_reason(error)}",
            expected="a complete tar file without compression, so that its members can be read at random",
        ) from None


def _reason(error: Exception) -> str:
    return "its headers are nested too deeply" if isinstance(error, RecursionError) else str(error)


class _HeaderReader:
    """A file for tarfile that limits a long name, whatever length its header claims."""

    def __init__(self, raw: ReadableFile) -> None:
        self._raw = raw
        self.seek, self.tell = raw.seek, raw.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims a name or text of {size} bytes")
        return self._raw.read(size)


def _open_tar(raw: ReadableFile) -> tarfile.TarFile:
    reader: Any = _HeaderReader(raw)  # the types of tarfile want one that can be written to
    return tarfile.open(fileobj=reader, mode="r:")


def _read_members(path: Path) -> tuple[dict[str, dict[str, _File]], Counter[str]]:
    """Returns the regular files of an archive by key and suffix, and the number of other members by kind."""
    samples: dict[str, dict[str, _File]] = {}
    skipped: Counter[str] = Counter()
    end = -1
    with _readable(path), _open(path) as raw, _open_tar(raw) as archive:
        for member in archive:
            if member.offset <= end or member.size < 0:
                raise tarfile.ReadError(f"the header of {member.name} leads back to members before it")
            end = member.offset
            name = PurePosixPath(member.name)
            kind = _kind(member, name)
            if kind is not None:
                skipped[kind] += kind != _FOLDER
                continue
            stem, _, suffix = name.name.partition(".")
            # Read now: a remote caption came with its header.
            is_text = suffix.lower() in ("txt", "json") and member.size <= _MAX_TEXT_BYTES
            file = archive.extractfile(member) if is_text else None
            text = None if file is None else file.read()
            files = samples.setdefault(str(name.parent / stem), {})
            skipped["another of the same name"] += f".{suffix.lower()}" in files
            files[f".{suffix.lower()}"] = _File(member.name, member.offset_data, member.size, text)
    return samples, +skipped


_FOLDER = "folder"


def _kind(member: tarfile.TarInfo, name: PurePosixPath) -> str | None:
    """Returns the kind of a member that is not read, or None for a file."""
    if member.isdir():
        return _FOLDER
    if name.name.startswith("."):
        return "hidden file"
    if member.issparse():
        return "sparse file"
    return None if member.isreg() else "link or device"


def _open(path: Path) -> ReadableFile:
    return RemoteFile(path, block_bytes=_BLOCK_BYTES) if is_remote(path) else open_regular(path)


def _sort(samples: dict[str, dict[str, _File]], skipped: Counter[str]) -> ArchiveIndex:
    clips: list[Member] = []
    faults: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    for files in samples.values():
        suffix = next((s for kind in (VIDEO_SUFFIXES, IMAGE_SUFFIXES) for s in kind if s in files), None)
        if suffix is None:
            ignored.update(list(files))
            continue
        clip = files[suffix]
        try:
            check_name(clip.name)
            used, caption = _caption(files)
            others = tuple(
                (name, file.offset, file.size) for name, file in files.items() if name not in (suffix, used)
            )
            clips.append(Member(clip.name, clip.offset, clip.size, caption, others))
        except DataError as error:
            faults.append((clip.name, error.problem))
    return ArchiveIndex(
        tuple(clips), tuple(faults), tuple(sorted(ignored.items())), tuple(sorted(skipped.items()))
    )


def _caption(files: dict[str, _File]) -> tuple[str, str]:
    """Returns the caption of a clip and the suffix of the file that holds it."""
    if ".txt" in files:
        return ".txt", clean_caption(_text(files[".txt"]), ".txt")
    if ".json" not in files:
        raise DataError("there is no .txt or .json next to it")
    content = parse_json(_text(files[".json"]))
    names = list(content) if isinstance(content, dict) else []
    column = find_columns((name for name in names if name not in COMMON["video"]), {}, place="its .json")
    caption = content[column["caption"]] if "caption" in column else None
    if not isinstance(caption, str):
        raise DataError(f"its .json has no `caption`; {shown_columns(names)}")
    return ".json", clean_caption(caption, ".json")


def _text(file: _File) -> str:
    if file.text is None:
        raise DataError(f"{file.name} has {file.size} bytes")
    try:
        return file.text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 (byte {error.start})") from None


def _place(path: Path) -> Path:
    """Returns the path of a remote archive's saved index, one file per archive."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "sat_train", "archives", sha256(str(path).encode()).hexdigest() + ".json")


def _key(path: Path, state: RemoteState) -> dict[str, Any]:
    return {"format": _FORMAT, "url": public_url(path), "size": state.size, "change": state.change}


def _recall(path: Path, state: RemoteState) -> ArchiveIndex | None:
    """Returns the saved index, or None if it is missing, outdated or damaged."""
    place = _place(path)
    try:
        saved: _SavedIndex = read_record(_SavedIndex, read_text(place, limit=_INDEX_BYTES))
        is_current = saved.key == _key(path, state) and saved.sha256 == _hash(saved.index)
        return saved.index if is_current else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s): %s is indexed again", place, error, public_url(path))
        return None


def _remember(path: Path, state: RemoteState, index: ArchiveIndex) -> None:
    """Saves the index for the next start, unless later changes of the archive could go unnoticed."""
    if not state.shows_changes():
        return
    saved = _SavedIndex(_key(path, state), _hash(index), index)
    place = _place(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps(asdict(saved)))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): the next start indexes %s again", place, error, public_url(path)
        )


def _hash(index: ArchiveIndex) -> str:
    return sha256(json.dumps(asdict(index), sort_keys=True).encode()).hexdigest()
