"""Facts about files, kept so that none is read again: their identity, and the headers of clips."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import READER, ClipInfo, Span, open_part, read_headers, read_stamp
from sat_train.data.clips.remote import is_remote
from sat_train.encoding.cache.key import Origin, digest
from sat_train.files import open_regular, read_text, write_text
from sat_train.log import get_logger

log = get_logger(__name__)

Identity = Literal["content", "stat"]
FOLDER = "files"
_CHUNK_BYTES = 4 * 1024 * 1024
_MOST_BYTES = 128_000_000  # of one file of what is known
_MOST_FILES = 50_000  # in one, which makes about 30 MB
# A file changed less than this before it was hashed may change again within one tick of the clock.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class _Known:
    """One file as it was: `stamp` is that of `read_stamp`; any change of contents changes it."""

    stamp: tuple[int, ...]
    sha256: str | None
    info: ClipInfo | None


class FileMetadata:
    """Remembers the hash and the headers of files, for as long as size, times and inode stay the same.

    A file is hashed once, not once a run: what was learnt goes to `<cache_dir>/files/` and is read at the
    next start.

    Args:
        cache_dir: Folder of the cache.
        identity: `content`: the SHA-256 of the bytes stands for a file, wherever it lies. `stat`: path, size
            and time of change do, and nothing is hashed.
        timeout_s: Reading headers that blocks longer than this fails; None: never.
    """

    def __init__(self, cache_dir: Path, *, identity: Identity = "content", timeout_s: float | None = None):
        self._folder = cache_dir / FOLDER
        self._identity = identity
        self._timeout_s = timeout_s
        self._known: dict[str, _Known] = {}
        self._names: dict[str, str] = {}
        self._new: dict[str, _Known] = {}
        self._new_names: dict[str, str] = {}
        self._is_told = False
        for path in sorted(self._folder.glob("*.json")):
            self._read(path)

    def origin(self, path: Path, span: Span | None = None) -> Origin:
        """Returns what stands for a file.

        Raises:
            BadClip: It is missing or cannot be read.
        """
        stamp = read_stamp(path)
        if self._identity == "stat":
            identity = digest(path=str(path), span=_told(span), size=stamp[0], mtime_ns=stamp[1])
        else:
            identity = self._sha256(path, span, stamp)
        part = None if span is None else (span.offset, span.size)
        return Origin(str(path), stamp[0], stamp[1], identity, part)

    def info(self, path: Path, span: Span | None = None, *, with_turn: bool = False) -> ClipInfo:
        """Returns the headers of a clip.

        Args:
            path: The file.
            span: Part of it that holds the clip; None: all of it.
            with_turn: Say how the picture is to be turned, too, for which its first frame is decoded.

        Raises:
            BadClip: It is missing, empty, or no video.
        """
        stamp = read_stamp(path)
        remembered = self.recall_info(path, span, stamp, with_turn=with_turn)
        if remembered is not None:
            return remembered
        info = read_headers(path, span=span, with_turn=with_turn, timeout_s=self._timeout_s)
        self.learn_info(path, span, stamp, info)
        return info

    def recall_info(
        self, path: Path, span: Span | None, stamp: tuple[int, ...], *, with_turn: bool = False
    ) -> ClipInfo | None:
        """Returns the headers of a clip whose file has this state; None where it must be opened for them."""
        known = self._lookup(path, span, stamp)
        info = None if known is None else known.info
        return None if info and with_turn and info.is_turned is None else info

    def learn_info(self, path: Path, span: Span | None, stamp: tuple[int, ...], info: ClipInfo) -> None:
        """Remembers the headers of a clip that were read after its file had this state."""
        known = self._lookup(path, span, stamp)
        self._learn(path, span, _Known(stamp, None if known is None else known.sha256, info))

    def sha256(self, path: Path, span: Span | None = None) -> str:
        """Returns the SHA-256 of the bytes of a file or of a part of it, whatever stands for clips.

        Raises:
            BadClip: It is missing or cannot be read.
        """
        return self._sha256(path, span, read_stamp(path))

    def named(self, name: str) -> str | None:
        """Returns what was remembered under a name."""
        return self._names.get(name)

    def remember(self, name: str, value: str) -> None:
        """Remembers a text under a name; a later one replaces it."""
        if self._names.get(name) != value:
            self._names[name] = self._new_names[name] = value

    def learnt(self) -> dict[str, _Known]:
        """Returns what this process has found out since it last wrote, to tell other ranks."""
        return dict(self._new)

    def merge(self, learnt: dict[str, _Known]) -> None:
        """Takes over what another rank found out; that one writes it."""
        self._known.update(learnt)

    def publish(self) -> None:
        """Writes what was learnt since, in files of their own, each complete or not at all.

        It saves time in the next run and nothing else: where the folder cannot be written, as on a mount that
        is read-only, that is said once.
        """
        new = list(self._new.items())
        if not new and not self._new_names:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for first in range(0, max(1, len(new)), _MOST_FILES):
                files = {
                    key: {**asdict(known), "reader": READER}
                    for key, known in new[first : first + _MOST_FILES]
                }
                name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
                write_text(self._folder / name, json.dumps({"files": files, "names": self._new_names}))
        except OSError as error:
            if not self._is_told:
                reason = error.strerror or error
                log.warning("%s: %s: the next run must hash these files again", self._folder, reason)
            self._is_told = True
        self._new, self._new_names = {}, {}

    def _read(self, path: Path) -> None:
        try:
            body = json.loads(read_text(path, limit=_MOST_BYTES))
            known = {key: _from_json(value) for key, value in body["files"].items()}
            names = {key: _checked(value, str) for key, value in body["names"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error)[:200] or type(error).__name__
            log.warning("%s cannot be read (%s): those files will be hashed again", path, reason)
            return
        self._known.update(known)
        self._names.update(names)

    def _sha256(self, path: Path, span: Span | None, stamp: tuple[int, ...]) -> str:
        known = self._lookup(path, span, stamp)
        if known is not None and known.sha256 is not None:
            return known.sha256
        sha256 = _hash(path, span)
        if read_stamp(path) != stamp:
            raise BadClip("changed", "the file was changed while it was read")
        self._learn(path, span, _Known(stamp, sha256, None if known is None else known.info))
        return sha256

    def _lookup(self, path: Path, span: Span | None, stamp: tuple[int, ...]) -> _Known | None:
        known = self._known.get(_name(path, span))
        return known if known is not None and known.stamp == stamp else None

    def _learn(self, path: Path, span: Span | None, known: _Known) -> None:
        if any(known.stamp[1:]) and time.time_ns() - max(known.stamp[1:3]) > _RACY_NS:
            name = _name(path, span)
            self._known[name] = self._new[name] = known


def _name(path: Path, span: Span | None) -> str:
    return str(path) if span is None else f"{path}\n{span.offset}+{span.size}"


def _told(span: Span | None) -> list[int] | None:
    return None if span is None else [span.offset, span.size]


def _hash(path: Path, span: Span | None) -> str:
    sha256 = hashlib.sha256()
    try:
        whole = span is None and not is_remote(path)
        with open_regular(path) if whole else open_part(path, span, block_bytes=_CHUNK_BYTES) as file:
            while chunk := file.read(_CHUNK_BYTES):
                sha256.update(chunk)
    except OSError as error:
        raise BadClip("unreadable", error.strerror or str(error)) from None
    return sha256.hexdigest()


def _from_json(value: dict[str, Any]) -> _Known:
    """Returns what a file of the cache says, whose types are checked: anybody may have written it."""
    sha256 = value["sha256"]
    info = value["info"] if value.get("reader") == READER else None  # another version saw other times in it
    stamp = tuple(_checked(number, int) for number in value["stamp"])
    known = None if info is None else ClipInfo(**info)
    if known is not None:
        for name in ("height", "width"):
            _checked(getattr(known, name), int)
        for name in ("rate", "first", "last"):
            if not math.isfinite(_checked(getattr(known, name), int, float)):
                raise ValueError(f"{name} is not finite")
        _checked(known.codec, str)
        _checked(known.is_image, bool)
        _checked(known.is_turned, bool, type(None))
        if known.rate <= 0 or known.height <= 0 or known.width <= 0:
            raise ValueError("a clip without size or rate")
    return _Known(stamp, _checked(sha256, str, type(None)), known)


def _checked(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"{str(value)[:40]!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value
