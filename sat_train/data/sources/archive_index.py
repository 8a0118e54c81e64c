"""What lies where in tar archives, from their headers alone; of remote archives it is remembered."""

from __future__ import annotations

import json
import os
import secrets
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sat_train.data.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.remote import RemoteFile, RemoteState, is_remote, read_state
from sat_train.data.sources.records import clean_caption
from sat_train.errors import DataError
from sat_train.files import write_text
from sat_train.log import get_logger

log = get_logger(__name__)

_FORMAT = 1  # raise it when the same archive begins to give another index
_MAX_TEXT_BYTES = 1 << 20
_NUM_THREADS = 16
# Of one request while indexing: the rest of one clip's header, its caption and the next clip's header fit.
_BLOCK_BYTES = 1 << 15


@dataclass(frozen=True)
class Member:
    """One clip of an archive.

    Args:
        name: In the archive.
        offset: Where its bytes begin.
        size: Bytes.
        caption: Its text.
    """

    name: str
    offset: int
    size: int
    caption: str


@dataclass(frozen=True)
class ArchiveIndex:
    """What an archive holds.

    Args:
        clips: In the order of their first members.
        faults: Clips without a usable caption, by name, and why.
        ignored: Members that are no clips, by suffix.
    """

    clips: tuple[Member, ...]
    faults: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _File:
    """A regular member; `text` is what a caption's file holds."""

    name: str
    offset: int
    size: int
    text: bytes | None


def index_archives(paths: Sequence[Path]) -> list[ArchiveIndex]:
    """Indexes archives, several at once.

    Raises:
        DataError: One is missing, broken or compressed, or its storage does not answer.
    """
    with ThreadPoolExecutor(max(1, min(_NUM_THREADS, len(paths)))) as pool:
        return list(pool.map(_index, paths))


def _index(path: Path) -> ArchiveIndex:
    if not is_remote(path):
        return _sort(_read_members(path))
    with _readable(path):
        state = read_state(path)
    known = _recall(path, state)
    if known is not None:
        return known
    index = _sort(_read_members(path))
    with _readable(path):
        if read_state(path) != state:
            raise OSError("it was changed while it was read")
    _remember(path, state, index)
    return index


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what can go wrong with an archive into one error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such archive", remedy="correct args.train_data") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: this archive cannot be read: {error}",
            expected="a complete tar file without compression, so that its members can be read at random",
        ) from None


def _read_members(path: Path) -> dict[str, dict[str, _File]]:
    """Returns the regular files of an archive by key and suffix."""
    samples: dict[str, dict[str, _File]] = {}
    with _readable(path), _open(path) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isreg() or member.issparse() or name.name.startswith("."):
                continue
            stem, _, suffix = name.name.partition(".")
            # Read now: a remote caption came with its header.
            is_text = suffix.lower() in ("txt", "json") and member.size <= _MAX_TEXT_BYTES
            file = archive.extractfile(member) if is_text else None
            text = None if file is None else file.read()
            found = _File(member.name, member.offset_data, member.size, text)
            samples.setdefault(str(name.parent / stem), {})[f".{suffix.lower()}"] = found
    return samples


def _open(path: Path) -> IO[bytes]:
    return RemoteFile(path, block_bytes=_BLOCK_BYTES) if is_remote(path) else path.open("rb")


def _sort(samples: dict[str, dict[str, _File]]) -> ArchiveIndex:
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
            clips.append(Member(clip.name, clip.offset, clip.size, _caption(files)))
        except DataError as error:
            faults.append((clip.name, error.problem))
    return ArchiveIndex(tuple(clips), tuple(faults), tuple(sorted(ignored.items())))


def _caption(files: dict[str, _File]) -> str:
    if ".txt" in files:
        return clean_caption(_text(files[".txt"]), ".txt")
    if ".json" not in files:
        raise DataError("there is no .txt and no .json beside it")
    try:
        told = json.loads(_text(files[".json"]))
    except json.JSONDecodeError as error:
        raise DataError(f"its .json is no JSON ({error.msg})") from None
    caption = told.get("caption") if isinstance(told, dict) else None
    if not isinstance(caption, str):
        raise DataError("its .json has no `caption`")
    return clean_caption(caption, ".json")


def _text(file: _File) -> str:
    if file.text is None:
        raise DataError(f"{file.name} has {file.size} bytes")
    try:
        return file.text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 (byte {error.start})") from None


def _place(path: Path) -> Path:
    """Returns where the index of a remote archive is remembered: one file for each archive."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches, "sat_train", "archives", sha256(str(path).encode()).hexdigest() + ".json")


def _key(path: Path, state: RemoteState) -> dict[str, Any]:
    return {"format": _FORMAT, "url": str(path), "size": state.size, "change": state.change}


def _recall(path: Path, state: RemoteState) -> ArchiveIndex | None:
    """Returns the remembered index; None when there is none, it is of another state, or it is damaged."""
    place = _place(path)
    try:
        body = json.loads(place.read_text(encoding="utf-8"))
        if body["key"] != _key(path, state) or body["sha256"] != _hash(body["index"]):
            return None
        told = body["index"]
        return ArchiveIndex(
            tuple(Member(**clip) for clip in told["clips"]),
            tuple((name, why) for name, why in told["faults"]),
            tuple((suffix, count) for suffix, count in told["ignored"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used (%s): %s is indexed again", place, error, path)
        return None


def _remember(path: Path, state: RemoteState, index: ArchiveIndex) -> None:
    """Writes the index for the next start, unless a later change of the archive could go unseen."""
    if not state.shows_changes():
        return
    told = json.loads(json.dumps(asdict(index)))
    body = {"key": _key(path, state), "sha256": _hash(told), "index": told}
    place = _place(path)
    draft = place.with_name(f"{place.stem}-{secrets.token_hex(4)}.draft")  # several may write at once
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(draft, json.dumps(body))
        os.replace(draft, place)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start indexes %s again", place, error, path)


def _hash(told: Any) -> str:
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
