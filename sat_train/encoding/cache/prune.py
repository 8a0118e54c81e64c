"""Cache maintenance: lists entries, finds stale ones, removes them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import Span, read_stamp
from sat_train.data.clips.remote import is_remote, make_path
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.key import CODE_VERSION, EncoderDigests, Origin
from sat_train.encoding.cache.shards import (
    FOLDER,
    EntryInfo,
    Header,
    ShardWriter,
    TensorSlot,
    find_fault,
    read_header,
    read_tensor,
)
from sat_train.errors import DataError
from sat_train.files import PART_SUFFIX, open_regular, sync_folder
from sat_train.log import get_logger

log = get_logger(__name__)

IsStale = Callable[[str, EntryInfo], str]


@dataclass(frozen=True)
class CacheStats:
    """One kind of entries of one encoder.

    Args:
        kind: clip, image, text or failed.
        encoder: First letters of the encoder's digest.
        entries: Their number.
        size: Bytes of their tensors.
        stale: Number of stale entries, by reason.
    """

    kind: str
    encoder: str
    entries: int
    size: int
    stale: tuple[tuple[str, int], ...]


def read_shards(cache_dir: Path) -> Iterator[tuple[Path, Header | None, str]]:
    """Yields each shard with its header, or the reason why it cannot be read.

    Raises:
        DataError: There is no cache in the folder.
    """
    folder = cache_dir / FOLDER
    if not folder.is_dir():
        raise DataError(
            f"{cache_dir}: there is no cache in this folder",
            expected=f"a data.cache_dir, with {FOLDER}/ in it",
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            yield path, read_header(path), ""
        except (OSError, ValueError) as error:
            yield path, None, getattr(error, "strerror", None) or str(error)


class Staleness:
    """Decides which entries are no longer of use; checks each file once.

    An entry is stale when the code that wrote it computed other values, when its file has changed (its
    contents, in a cache by content), when it repeats a key, when it comes from an encoder other than
    `encoders`, and, if requested, when its file is gone or its clip failed. A file that was only moved is
    found by its contents, so entries without a file are kept by default.

    Args:
        file_metadata: Metadata of files.
        encoders: The encoders in use; None: any may be.
        drop_gone: Entries whose file is no longer at its path are stale too.
        drop_failed: Known failures are stale too.
        asks_remote: Query remote storage about the files there. Off, their entries count as unchanged: the
            author of the cache chooses the URLs that are queried.
    """

    def __init__(
        self,
        file_metadata: FileMetadata,
        *,
        encoder_digests: EncoderDigests | None = None,
        drop_gone: bool = False,
        drop_failed: bool = False,
        asks_remote: bool = False,
    ) -> None:
        self._file_metadata, self._encoder_digests = file_metadata, encoder_digests
        self._drop_gone, self._drop_failed, self._asks_remote = drop_gone, drop_failed, asks_remote
        self._seen: set[tuple[str, bool]] = set()
        self._origins: dict[Origin, str] = {}
        self._stamps: dict[Path, tuple[int, ...]] = {}

    def reason(self, key: str, info: EntryInfo) -> str:
        """Returns the reason why an entry is stale; nothing when it is not."""
        met = (key, info.kind == "failed")
        if met in self._seen:
            return "repeated"
        self._seen.add(met)
        if info.code_version != CODE_VERSION:
            return "older code"
        if info.kind == "failed" and self._drop_failed:
            return "failed"
        encoders = self._encoder_digests
        if encoders and info.encoder and info.encoder not in (encoders.vae, encoders.text):
            return "other encoder"
        return "" if info.origin is None else self._origin(info.origin)

    def _origin(self, origin: Origin) -> str:
        if origin not in self._origins:
            self._origins[origin] = self._look(origin)
        return self._origins[origin]

    def _look(self, origin: Origin) -> str:
        if "://" in origin.path and not self._asks_remote:
            return ""
        try:
            path = make_path(origin.path)
            stamp = self._stamp(path)
            if stamp[:2] == (origin.size, origin.mtime_ns):
                return ""
            if is_remote(path) or (origin.part is None and stamp[0] != origin.size):
                return "file changed"  # without its hash, which would cost the whole file
            span = None if origin.part is None else Span(*origin.part)
            return "" if self._file_metadata.sha256(path, span) == origin.identity else "file changed"
        except BadClip as error:
            return "file gone" if self._drop_gone and not error.may_pass else ""

    def _stamp(self, path: Path) -> tuple[int, ...]:
        """Returns the stamp of a file; many clips lie in one archive, which is queried once."""
        if path not in self._stamps:
            self._stamps[path] = read_stamp(path)
        return self._stamps[path]


def list_entries(cache_dir: Path, staleness: Staleness) -> tuple[list[CacheStats], list[str]]:
    """Counts the entries of a cache.

    Returns:
        A line for each kind and encoder, and the shards that cannot be read, with the reason.

    Raises:
        DataError: There is no cache in the folder.
    """
    entries: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    damaged: list[str] = []
    stale: dict[tuple[str, str], Counter[str]] = {}
    for path, header, fault in read_shards(cache_dir):
        if header is None:
            damaged.append(f"{path.name}: {fault}")
            continue
        for key, info in header.entries.items():
            group = (info.kind, info.encoder[:12])
            entries[group] += 1
            sizes[group] += sum(slot.num_bytes for slot in header.slots[key].values())
            reason = staleness.reason(key, info)
            if reason:
                stale.setdefault(group, Counter())[reason] += 1
    lines = [
        CacheStats(*group, entries[group], sizes[group], tuple(sorted(stale.get(group, Counter()).items())))
        for group in sorted(entries)
    ]
    return lines, damaged


def verify_entries(cache_dir: Path) -> tuple[int, list[str]]:
    """Reads every byte and compares it with the hash stored with it.

    Returns:
        Number of intact entries, and the damaged ones with the reason.

    Raises:
        DataError: There is no cache in the folder.
    """
    whole, faults = 0, []
    for path, header, fault in read_shards(cache_dir):
        if header is None:
            faults.append(f"{path.name}: {fault}")
            continue
        for key, info in header.entries.items():
            damage = _find_fault(path, header.slots[key], info)
            whole += not damage
            if damage:
                faults.append(f"{path.name}: {info.kind} of {info.name[:60]}: {damage}")
    return whole, faults


def prune_entries(cache_dir: Path, staleness: Staleness, *, drop_damaged: bool = False) -> tuple[int, int]:
    """Removes stale entries, damaged shards and partial writes; must not run while a run reads the cache.

    A partly stale shard is rewritten without the stale entries before the old one is removed. Rewritten and
    duplicate entries are compared with their hash: a damaged entry neither replaces an intact one nor
    receives a new hash.

    Args:
        cache_dir: Folder of the cache.
        staleness: Decides which entries are stale.
        drop_damaged: Read every byte, and remove entries that are damaged.

    Returns:
        Numbers of removed entries and bytes.

    Raises:
        DataError: There is no cache in the folder, or it cannot be written.
    """
    folder = cache_dir / FOLDER
    shards = list(read_shards(cache_dir))
    counts = Counter(key for _, header, _ in shards if header is not None for key in header.entries)
    before, num_removed = _size(folder), 0
    try:
        for path, header, fault in shards:
            if header is None:
                if path.is_file():
                    path.unlink()
                else:
                    log.warning("%s is left as it is: %s", path, fault)
                continue
            stale = {
                key
                for key, info in header.entries.items()
                if ((drop_damaged or counts[key] > 1) and _find_fault(path, header.slots[key], info))
                or staleness.reason(key, info)
            }
            if stale:
                rest = {key: info for key, info in header.entries.items() if key not in stale}
                num_removed += len(header.entries) - (_rewrite(cache_dir, path, header, rest) if rest else 0)
                path.unlink()
        for part in folder.glob(f"*{PART_SUFFIX}"):
            part.unlink()
        sync_folder(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror or error}", expected="a cache that can be changed"
        ) from error
    return num_removed, before - _size(folder)


def _rewrite(cache_dir: Path, path: Path, header: Header, entries: dict[str, EntryInfo]) -> int:
    """Writes entries of a shard into a new one; returns the number of intact ones."""
    writer, num_intact = ShardWriter(cache_dir, shard_bytes=1 << 62, interval_s=float("inf")), 0
    for key, info in entries.items():
        tensors = _tensors(path, header.slots[key])
        if not find_fault(tensors, info):
            writer.add(key, tensors, info)
            num_intact += 1
    writer.publish()
    return num_intact


def _find_fault(path: Path, slots: Mapping[str, TensorSlot], info: EntryInfo) -> str:
    try:
        return find_fault(_tensors(path, slots), info)
    except OSError as error:
        return error.strerror or str(error)


def _tensors(path: Path, slots: Mapping[str, TensorSlot]) -> dict[str, Tensor]:
    with open_regular(path) as file:
        return {part: read_tensor(file.fileno(), slot) for part, slot in slots.items()}


def _size(folder: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder))
