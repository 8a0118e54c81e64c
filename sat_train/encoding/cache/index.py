"""Index of the entries in all shards of a folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from torch import Tensor

from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.key import EncoderDigests
from sat_train.encoding.cache.shards import (
    FOLDER,
    EntryInfo,
    TensorSlot,
    find_fault,
    read_header,
    read_tensor,
)
from sat_train.errors import DataError
from sat_train.files import open_regular
from sat_train.log import get_logger

log = get_logger(__name__)

_OPEN_FILES = 64

Use = Literal["read", "require", "write"]


@dataclass(frozen=True)
class _Entry:
    """Location of an entry's tensors, and their expected layout."""

    shard: str
    slots: dict[str, TensorSlot]
    info: EntryInfo


class CacheIndex:
    """The entries of a cache folder, by key. Shards that appear later are found when a key is missed.

    The bytes of an entry are compared with their SHA-256 when this process first reads it. A damaged entry is
    logged and counts as missing from then on.

    Where a key was written several times, shards of this user come first, then the oldest, by the change time
    of the file system: a name can be forged.

    Args:
        cache_dir: Folder of the cache.

    Raises:
        DataError: The folder exists and cannot be read.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / FOLDER
        self._entries: dict[str, _Entry] = {}
        self._others: dict[str, list[_Entry]] = {}  # of keys that were written several times
        self._failed: dict[str, tuple[str, str]] = {}
        self._whole: set[str] = set()
        self._faults: dict[str, str] = {}
        self._seen: set[str] = set()
        self._changed_ns = -1
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        try:
            self._look()
        except OSError as error:
            raise DataError(
                f"{self._folder}: {error.strerror or error}",
                expected="a data.cache_dir that can be read, or that does not exist yet",
            ) from error

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Returns whether the cache holds the tensors of an entry."""
        return key in self._entries or (self.refresh() and key in self._entries)

    def failure(self, key: str) -> tuple[str, str] | None:
        """Returns the cause and detail of a known failure to decode a clip."""
        return None if key in self._entries else self._failed.get(key)

    def fault(self, key: str) -> str:
        """Returns the damage of an entry; nothing where it is not known to be damaged."""
        return self._faults.get(key, "")

    def refresh(self) -> bool:
        """Searches for shards published since the last time; returns whether there are any."""
        try:
            return self._look()
        except OSError:  # a shared disk that does not answer now is tried again at the next miss
            return False

    def _look(self) -> bool:
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if changed_ns == self._changed_ns:
            return False
        paths = [Path(entry.path) for entry in os.scandir(self._folder)]
        new = [path for path in paths if path.suffix == ".safetensors" and path.name not in self._seen]
        for path in sorted(new, key=_precedence):
            self._add(path.name)
        self._changed_ns = changed_ns
        return bool(new)

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Returns the tensors of an entry; None where there is no undamaged one."""
        while key in self:
            entry = self._entries[key]
            try:
                file = self._file(entry.shard)
                tensors = {part: read_tensor(file.fileno(), slot) for part, slot in entry.slots.items()}
                fault = "" if key in self._whole else find_fault(tensors, entry.info)
            except OSError as error:
                tensors, fault = {}, error.strerror or str(error)
            if not fault:
                self._whole.add(key)
                return tensors
            self.drop(key, fault)
        return None

    def is_whole(self, key: str) -> bool:
        """Returns whether an undamaged entry exists: reads it where this process has not yet."""
        return key in self and (key in self._whole or self.read(key) is not None)

    def drop(self, key: str, fault: str) -> None:
        """Treats an entry as missing from now on, and logs the reason."""
        entry = self._entries.pop(key)
        info = entry.info
        self._faults[key] = f"{self._folder / entry.shard}: the {info.kind} of {info.name[:80]}: {fault}"
        self._whole.discard(key)
        others = self._others.pop(key, [])
        if others:
            self._entries[key] = others[0]
            if others[1:]:
                self._others[key] = others[1:]
        log.warning("damaged cache entry, treated as missing: %s", self._faults[key])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files belong to their process

    def _add(self, name: str) -> None:
        self._seen.add(name)
        try:
            header = read_header(self._folder / name)
        except (OSError, ValueError) as error:
            log.warning("%s is left out: %s", self._folder / name, error)
            return
        for key, info in header.entries.items():
            entry = _Entry(name, header.slots[key], info)
            if info.detail is not None:
                self._failed[key] = info.detail
            elif key in self._entries:
                self._others.setdefault(key, []).append(entry)
            else:
                self._entries[key] = entry

    def _file(self, name: str) -> BinaryIO:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[name] = open_regular(self._folder / name)
        return self._open[name]


def _precedence(path: Path) -> tuple[bool, int, str]:
    try:
        status = path.stat()
    except OSError:
        return True, 0, path.name  # reported where its header is read
    return status.st_uid != os.getuid(), status.st_ctime_ns, path.name


@dataclass(frozen=True)
class OpenCache:
    """A cache folder, opened by one process.

    Args:
        folder: The folder.
        index: Its entries.
        file_metadata: Metadata of the source files.
        encoder_digests: Identity of the encoders.
        use: `require`: a missing entry is an error. `read`: it is encoded. `write`: nothing is read, samples
            only carry the keys of their encodings.
    """

    folder: Path
    index: CacheIndex
    file_metadata: FileMetadata
    encoder_digests: EncoderDigests
    use: Use
