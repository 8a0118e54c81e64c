"""Facts about files, cached so that none is read twice: their identity, and the headers of clips."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import READER, ClipInfo, Span, open_part, read_headers, read_stamp
from sat_train.data.clips.remote import is_remote
from sat_train.encoding.cache.key import Origin, digest
from sat_train.files import open_regular, read_text, write_text
from sat_train.json_record import JsonRecord, read_record
from sat_train.log import get_logger

log = get_logger(__name__)

Identity = Literal["content", "stat"]
FOLDER = "files"
_CHUNK_BYTES = 4 * 1024 * 1024
_MOST_BYTES = 128_000_000  # of one file of metadata
_MOST_FILES = 50_000  # in one, about 30 MB
# A file changed less than this before it was hashed may change again within one tick of the clock.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class _Known(JsonRecord):
    """State of one file: `stamp` is that of `read_stamp`; any change of contents changes it."""

    stamp: tuple[int, ...]
    sha256: str | None
    info: ClipInfo | None
    reader: int = READER


@dataclass(frozen=True)
class _Page(JsonRecord):
    """One file of metadata: facts by the name of the file, and texts by name."""

    files: dict[str, _Known]
    names: dict[str, str]


class FileMetadata:
    """Remembers the hash and the headers of files, for as long as size, times and inode stay the same.

    A file is hashed once, not once a run: hashes are written to `<cache_dir>/files/` and read at the next
    start.

    Args:
        cache_dir: Folder of the cache.
        identity: `content`: the SHA-256 of the bytes identifies a file, wherever it lies. `stat`: path, size
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
        self._has_warned = False
        for path in sorted(self._folder.glob("*.json")):
            self._read(path)

    def origin(self, path: Path, span: Span | None = None) -> Origin:
        """Returns the identity of a file.

        Raises:
            BadClip: It is missing or cannot be read.
        """
        stamp = read_stamp(path)
        if self._identity == "stat":
            identity = digest(path=str(path), span=_span_json(span), size=stamp[0], mtime_ns=stamp[1])
        else:
            identity = self._sha256(path, span, stamp)
        part = None if span is None else (span.offset, span.size)
        return Origin(str(path), stamp[0], stamp[1], identity, part)

    def info(self, path: Path, span: Span | None = None) -> ClipInfo:
        """Returns the headers of a clip.

        Args:
            path: The file.
            span: Part of it that holds the clip; None: all of it.

        Raises:
            BadClip: It is missing, empty, or no video.
        """
        stamp = read_stamp(path)
        remembered = self.recall_info(path, span, stamp)
        if remembered is not None:
            return remembered
        info = read_headers(path, span=span, timeout_s=self._timeout_s)
        self.learn_info(path, span, stamp, info)
        return info

    def recall_info(
        self, path: Path, span: Span | None, stamp: tuple[int, ...], *, with_turn: bool = False
    ) -> ClipInfo | None:
        """Returns the headers of a clip whose file has this state; None where the file must be opened."""
        known = self._lookup(path, span, stamp)
        info = None if known is None else known.info
        return None if info and with_turn and info.is_turned is None else info

    def learn_info(self, path: Path, span: Span | None, stamp: tuple[int, ...], info: ClipInfo) -> None:
        """Remembers headers of a clip that were read while its file had this state."""
        known = self._lookup(path, span, stamp)
        self._learn(path, span, _Known(stamp, None if known is None else known.sha256, info))

    def sha256(self, path: Path, span: Span | None = None) -> str:
        """Returns the SHA-256 of the bytes of a file or of a part of it, whatever identifies clips.

        Raises:
            BadClip: It is missing or cannot be read.
        """
        return self._sha256(path, span, read_stamp(path))

    def named(self, name: str) -> str | None:
        """Returns the text remembered under a name."""
        return self._names.get(name)

    def remember(self, name: str, value: str) -> None:
        """Remembers a text under a name; a later one replaces it."""
        if self._names.get(name) != value:
            self._names[name] = self._new_names[name] = value

    def learnt(self) -> dict[str, _Known]:
        """Returns the facts that this process has learnt since it last wrote, for other ranks."""
        return dict(self._new)

    def merge(self, learnt: dict[str, _Known]) -> None:
        """Adds the facts that another rank has learnt; that rank writes them."""
        self._known.update(learnt)

    def publish(self) -> None:
        """Writes new facts, in files of their own, each complete or absent.

        It only saves time in the next run: where the folder cannot be written, as on a read-only mount, one
        warning is logged.
        """
        new = list(self._new.items())
        if not new and not self._new_names:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for first in range(0, max(1, len(new)), _MOST_FILES):
                page = _Page(dict(new[first : first + _MOST_FILES]), self._new_names)
                name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
                write_text(self._folder / name, json.dumps(asdict(page)))
        except OSError as error:
            if not self._has_warned:
                reason = error.strerror or error
                log.warning("%s: %s: the next run must hash these files again", self._folder, reason)
            self._has_warned = True
        self._new, self._new_names = {}, {}

    def _read(self, path: Path) -> None:
        try:
            page: _Page = read_record(_Page, read_text(path, limit=_MOST_BYTES))
        except (OSError, ValueError) as error:
            reason = str(error)[:200] or type(error).__name__
            log.warning("%s cannot be read (%s): those files will be hashed again", path, reason)
            return
        for name, known in page.files.items():  # another version read other times
            self._known[name] = known if known.reader == READER else replace(known, info=None, reader=READER)
        self._names.update(page.names)

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


def _span_json(span: Span | None) -> list[int] | None:
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
