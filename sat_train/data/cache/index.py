"""Finds and reads entries over all shards of a folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from sat_train.data.cache.shards import FOLDER, Place, read_header, read_tensor
from sat_train.errors import DataError
from sat_train.log import get_logger

log = get_logger(__name__)

_OPEN_FILES = 64


class CacheIndex:
    """The entries of a cache folder, by key. Shards that appear later are found when a key is missed.

    Args:
        cache_dir: Folder of the cache.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / FOLDER
        self._places: dict[str, tuple[str, dict[str, Place]]] = {}
        self._failed: dict[str, tuple[str, str]] = {}
        self._seen: set[str] = set()
        self._changed_ns = -1
        self._open: OrderedDict[str, int] = OrderedDict()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        """Tells whether the tensors of an entry are there."""
        return key in self._places or (self.refresh() and key in self._places)

    def failure(self, key: str) -> tuple[str, str] | None:
        """Returns cause and finding where a clip is known to be undecodable."""
        return None if key in self._places else self._failed.get(key)

    def refresh(self) -> bool:
        """Looks for shards published since the last look; tells whether there are any."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if changed_ns == self._changed_ns:
            return False
        names = sorted(path.name for path in self._folder.glob("*.safetensors"))
        new = [name for name in names if name not in self._seen]
        for name in new:
            self._add(name)
        self._changed_ns = changed_ns
        return bool(new)

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Returns the tensors of an entry, None where there is none.

        Raises:
            DataError: Its shard has gone or is damaged.
        """
        if key not in self:
            return None
        name, places = self._places[key]
        try:
            descriptor = self._descriptor(name)
            return {part: read_tensor(descriptor, place) for part, place in places.items()}
        except OSError as error:
            raise DataError(
                f"{self._folder / name}: {error.strerror or error}",
                expected="a shard of the cache, which nobody removes while a run reads it",
                remedy="`sat-train cache verify` names what is damaged, `prune` removes it",
            ) from error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors belong to their process

    def _add(self, name: str) -> None:
        self._seen.add(name)
        try:
            header = read_header(self._folder / name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is left out: %s", self._folder / name, error)
            return
        for key, about in header.entries.items():
            if about.detail is not None:
                self._failed[key] = about.detail
            else:
                self._places.setdefault(key, (name, header.places[key]))

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._open[name]
