"""Finds and reads entries over all shards of a folder."""

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
    """The place of an entry's tensors, and what they must be."""

    shard: str
    slots: dict[str, TensorSlot]
    info: EntryInfo


class CacheIndex:
    """The entries of a cache folder, by key. Shards that appear later are found when a key is missed.

    The bytes of an entry are compared with their SHA-256 when this process first reads it. One that is
    damaged counts as missing from then on, and what is damaged is said.

    Where a key was written several times, shards of this user come first, then the one that has been there
    longest: by the time at which the file system put it there, as anybody can choose a name.

    Args:
        cache_dir: Folder of the cache.

    Raises:
        DataError: The folder is there and cannot be read.
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
                expected="a data.cache_dir that can be read, or that is not there yet",
            ) from error

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Returns whether the tensors of an entry are there."""
        return key in self._entries or (self.refresh() and key in self._entries)

    def failure(self, key: str) -> tuple[str, str] | None:
        """Returns cause and finding where a clip is known to be undecodable."""
        return None if key in self._entries else self._failed.get(key)

    def fault(self, key: str) -> str:
        """Returns what was found damaged under a key; nothing where it was not."""
        return self._faults.get(key, "")

    def refresh(self) -> bool:
        """Searches for shards published since the last time; returns whether there are any."""
        try:
            return self._look()
        except OSError:  # a shared disk that does not answer now is asked again at the next miss
            return False

    def _look(self) -> bool:
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if changed_ns == self._changed_ns:
            return False
        found = [Path(entry.path) for entry in os.scandir(self._folder)]
        new = [path for path in found if path.suffix == ".safetensors" and path.name not in self._seen]
        for path in sorted(new, key=_precedence):
            self._add(path.name)
        self._changed_ns = changed_ns
        return bool(new)

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Returns the tensors of an entry, None where there is none or all that there are are damaged."""
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
        """Returns whether an entry is there and undamaged: reads it where this process has not yet."""
        return key in self and (key in self._whole or self.read(key) is not None)

    def drop(self, key: str, fault: str) -> None:
        """Takes an entry as missing from now on, and says why."""
        entry = self._entries.pop(key)
        info = entry.info
        self._faults[key] = f"{self._folder / entry.shard}: the {info.kind} of {info.name[:80]}: {fault}"
        self._whole.discard(key)
        others = self._others.pop(key, [])
        if others:
            self._entries[key] = others[0]
            if others[1:]:
                self._others[key] = others[1:]
        log.warning("damaged cache entry, taken as missing: %s", self._faults[key])

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
        found = path.stat()
    except OSError:
        return True, 0, path.name  # it is said where its header is read
    return found.st_uid != os.getuid(), found.st_ctime_ns, path.name


@dataclass(frozen=True)
class OpenCache:
    """A cache folder as one process has it open.

    Args:
        folder: The folder.
        index: What it holds.
        file_metadata: What is known of the files.
        encoder_digests: What the encoders are.
        use: `require`: what is missing is an error. `read`: it is not. `write`: nothing is read, samples only
            say where their encodings belong.
    """

    folder: Path
    index: CacheIndex
    file_metadata: FileMetadata
    encoder_digests: EncoderDigests
    use: Use
