"""Shards: safetensors files of many entries, published atomically, indexed by their header alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sat_train.encoding.cache.key import CODE_VERSION, Origin
from sat_train.errors import DataError
from sat_train.files import open_regular, sync_folder, write_file
from sat_train.json_record import JsonRecord, Word, read_record
from sat_train.log import get_logger

log = get_logger(__name__)

FOLDER = "shards"
FORMAT = "sat_train cache 2"
_MAX_HEADER_BYTES = 32_000_000
_PROBE = ".probe"  # suffix of a file that is removed at once
_MOST_ENTRIES = 5_000  # of one shard: a header of a few megabytes
_RETRY_S = 60  # after a shard could not be written
_MOST_WAITING = 4  # shards that may wait for a disk with room
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class EntryInfo(JsonRecord):
    """Description of an entry, without its tensors.

    Args:
        kind: `clip`, or the name of a condition. `failed` has no tensors: it records that the clip cannot be
            decoded.
        name: Clip or caption, for messages.
        encoder: Digest of the encoder; empty for `failed`.
        origin: Its source file; None for texts.
        detail: Cause and message of a failure.
        code_version: Version of the code that encoded it.
        sha256: Of the bytes of its tensors, in the order of their names.
    """

    kind: Word
    name: str
    encoder: str
    origin: Origin | None = None
    detail: tuple[str, str] | None = None
    code_version: int = CODE_VERSION
    sha256: str = ""


@dataclass(frozen=True)
class TensorSlot:
    """Place of a tensor in its file: shape, dtype, and first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """Contents of a shard.

    Args:
        entries: By key.
        slots: By key, then by the tensor's name.
        size: Bytes of the file.
    """

    entries: dict[str, EntryInfo]
    slots: dict[str, dict[str, TensorSlot]]
    size: int


class ShardWriter:
    """Collects entries and publishes them as shards. Any number of processes may write to one folder.

    A kill loses only unpublished entries: at most `shard_bytes`, at most `interval_s` of work.

    Args:
        cache_dir: Folder of the cache.
        rank: Part of the names of the files.
        shard_bytes: A shard is published once it is this large.
        interval_s: And after this time, whatever its size.
        waits: A shard that cannot be written is logged once, held in memory and retried a minute later, so
            that a full disk does not end the training. Off, it is an error.
    """

    def __init__(
        self,
        cache_dir: Path,
        *,
        rank: int = 0,
        shard_bytes: int = 256_000_000,
        interval_s: float = 300,
        waits: bool = False,
    ) -> None:
        self._folder = cache_dir / FOLDER
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._interval_s = interval_s
        self._waits = waits
        self._retry_at: float | None = None
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, EntryInfo] = {}
        self._bytes = 0
        self._since = 0.0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def add(self, key: str, tensors: Mapping[str, Tensor], info: EntryInfo) -> None:
        """Adds one entry; a pending entry of the same key stays.

        An entry that is not finite is dropped: it would spoil every run that reads it.

        Args:
            key: Its key in the cache.
            tensors: By name; copied to the CPU.
            info: Its `sha256` is filled in.

        Raises:
            DataError: A full shard cannot be written.
        """
        if key in self._entries or self._bytes > _MOST_WAITING * self._shard_bytes:
            return
        if not are_finite(tensors):
            log.warning(
                "%s: the encoded %s is not finite, and is not kept in the cache", info.name, info.kind
            )
            return
        if not self._entries:
            self._since = time.monotonic()
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        self._tensors.update({f"{key}/{name}": tensor for name, tensor in held.items()})
        self._entries[key] = replace(info, sha256=hash_tensors(held))
        self._bytes += sum(tensor.nbytes for tensor in held.values())
        is_old = time.monotonic() - self._since >= self._interval_s
        if self._bytes >= self._shard_bytes or len(self._entries) >= _MOST_ENTRIES or is_old:
            self._publish_in_time()

    def publish_or_warn(self) -> None:
        """Publishes pending entries, or warns that they are lost."""
        try:
            self.publish()
        except DataError as error:
            log.warning(
                "%d encodings are lost and will be computed again by the next run: %s",
                len(self._entries),
                error,
            )

    def _publish_in_time(self) -> None:
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return
        try:
            self.publish()
        except DataError as error:
            if not self._waits:
                raise
            if self._retry_at is None:
                log.warning("training continues, and encoded samples wait in memory: %s", error)
            self._retry_at = time.monotonic() + _RETRY_S

    def publish(self) -> None:
        """Publishes pending entries.

        Raises:
            DataError: The disk is full or cannot be written.
        """
        if not self._entries:
            return
        body = {key: asdict(info) for key, info in self._entries.items()}
        data = save(self._tensors, metadata={"format": FORMAT, "entries": json.dumps(body)})
        self._write(".safetensors", data)
        if self._retry_at is not None:
            log.info("%s: the waiting samples are written", self._folder.parent)
        self._tensors, self._entries, self._bytes, self._retry_at = {}, {}, 0, None

    def check_folder(self) -> None:
        """Writes a byte and removes it, so that a folder that takes nothing is known before work is done.

        Raises:
            DataError: The disk is full or cannot be written.
        """
        self._write(_PROBE, b"0").unlink(missing_ok=True)

    def _write(self, suffix: str, data: bytes) -> Path:
        path = self._folder / f"{time.time_ns():020d}-{self._rank:05d}-{secrets.token_hex(4)}{suffix}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(path, lambda file: file.write(data))
            sync_folder(self._folder)
        except OSError as error:
            raise DataError(
                f"data.cache_dir = {self._folder.parent}: {error.strerror or error}",
                expected="a folder with room for the encoded samples",
                remedy="free some space or choose another folder; shards published before remain",
            ) from error
        return path


def read_header(path: Path) -> Header:
    """Reads the header of a shard, whose claims are compared with the file before they are trusted.

    Raises:
        ValueError: It is not a shard of this format, or not complete.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes")
        text = file.read(length)
    try:
        return _parse_header(text, size)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from None


def _parse_header(text: bytes, size: int) -> Header:
    body: dict[str, Any] = json.loads(text)
    metadata = body.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    start = 8 + len(text)
    all_slots = {name: _slot(spec, start) for name, spec in body.items()}
    end = max((slot.offset + slot.num_bytes for slot in all_slots.values()), default=start)
    if size != end:
        raise ValueError(f"{size} bytes, its header promises {end}")
    entries: dict[str, EntryInfo] = read_record(dict[str, EntryInfo], metadata["entries"])
    if any((info.kind == "failed") != (info.detail is not None) for info in entries.values()):
        raise ValueError("only a failure has a reason")
    slots: dict[str, dict[str, TensorSlot]] = {key: {} for key in entries}
    for name, slot in all_slots.items():
        key, _, part = name.rpartition("/")
        slots[key][part] = slot
    return Header(entries, slots, size)


def _slot(spec: dict[str, Any], start: int) -> TensorSlot:
    first, last = spec["data_offsets"]
    shape = tuple(spec["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError("shapes and offsets are whole numbers")
    slot = TensorSlot(shape, DTYPES[spec["dtype"]], start + first)
    if slot.num_bytes != last - first:
        raise ValueError(f"a tensor of {slot.num_bytes} bytes in {last - first}")
    return slot


def read_tensor(descriptor: int, slot: TensorSlot) -> Tensor:
    """Reads one tensor of an open shard into memory of its own.

    Raises:
        OSError: The file ends before the tensor does, or cannot be read.
    """
    tensor = torch.empty(slot.shape, dtype=slot.dtype)
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    at = 0
    while at < len(view):
        count = os.preadv(descriptor, [view[at:]], slot.offset + at)
        if count == 0:
            raise OSError("the file ends inside a tensor")
        at += count
    return tensor


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of tensors on the CPU: names, shapes, dtypes and bytes, in the order of names."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        sha256.update(f"{name} {shape} {dtype}\n".encode())
        sha256.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether no tensor holds an infinity or a NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def find_fault(tensors: Mapping[str, Tensor], info: EntryInfo) -> str:
    """Returns the reason why the tensors of an entry must not be used; nothing when they are intact."""
    if hash_tensors(tensors) != info.sha256:
        return "contents changed (SHA-256 differs)"
    return "" if are_finite(tensors) else "holds values that are not finite"
