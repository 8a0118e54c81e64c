"""Shards: safetensors files of many entries, complete or absent, readable by their header alone."""

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
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from sat_train.data.cache.key import CODE_VERSION, Origin
from sat_train.errors import DataError
from sat_train.files import sync_folder, write_file

FOLDER = "shards"
FORMAT = "sat_train cache 1"
_MAX_HEADER_BYTES = 100_000_000
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Kind = Literal["clip", "image", "text", "failed"]


@dataclass(frozen=True)
class About:
    """What an entry is, beside its tensors.

    Args:
        kind: `failed` has no tensors: the clip cannot be decoded, and that is known.
        name: Clip or caption, for people.
        encoder: Digest of the encoder; empty for `failed`.
        origin: The file it was made from; None for texts.
        detail: Cause and finding of a failure.
        code_version: Of the code that made it.
        sha256: Of the bytes of its tensors, in the order of their names.
    """

    kind: Kind
    name: str
    encoder: str
    origin: Origin | None = None
    detail: tuple[str, str] | None = None
    code_version: int = CODE_VERSION
    sha256: str = ""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: shape, dtype, and first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a shard holds.

    Args:
        entries: By key.
        places: By key, then by the tensor's name.
        size: Bytes of the file.
    """

    entries: dict[str, About]
    places: dict[str, dict[str, Place]]
    size: int


class ShardWriter:
    """Collects entries and publishes them as shards. Any number of processes may write to one folder.

    What a kill costs is what was not published: at most `shard_bytes`, at most `interval_s` of work.

    Args:
        cache_dir: Folder of the cache.
        rank: For the names of the files.
        shard_bytes: A shard is published once it is this large.
        interval_s: And after this time, however small it is.
    """

    def __init__(
        self, cache_dir: Path, *, rank: int = 0, shard_bytes: int = 256_000_000, interval_s: float = 300
    ) -> None:
        self._folder = cache_dir / FOLDER
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._interval_s = interval_s
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, About] = {}
        self._bytes = 0
        self._since = 0.0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def add(self, key: str, tensors: Mapping[str, Tensor], about: About) -> None:
        """Adds one entry; one that waits under this key already is kept instead.

        Args:
            key: What it is found by.
            tensors: By name; copied to the CPU.
            about: Its `sha256` is filled in.

        Raises:
            DataError: A full shard cannot be written.
        """
        if key in self._entries:
            return
        if not self._entries:
            self._since = time.monotonic()
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        self._tensors.update({f"{key}/{name}": tensor for name, tensor in held.items()})
        self._entries[key] = replace(about, sha256=hash_tensors(held))
        self._bytes += sum(tensor.nbytes for tensor in held.values())
        if self._bytes >= self._shard_bytes or time.monotonic() - self._since >= self._interval_s:
            self.publish()

    def publish(self) -> None:
        """Writes what waits.

        Raises:
            DataError: The disk is full or cannot be written.
        """
        if not self._entries:
            return
        body = {key: asdict(about) for key, about in self._entries.items()}
        data = save(self._tensors, metadata={"format": FORMAT, "entries": json.dumps(body)})
        name = f"{time.time_ns():020d}-{self._rank:05d}-{secrets.token_hex(4)}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / name, lambda file: file.write(data))
            sync_folder(self._folder)
        except OSError as error:
            raise DataError(
                f"data.cache_dir = {self._folder.parent}: {error.strerror or error}",
                expected="a folder with room for the encoded samples",
                remedy="make room or name another folder; what was published before is kept",
            ) from error
        self._tensors, self._entries, self._bytes = {}, {}, 0


def read_header(path: Path) -> Header:
    """Reads what a shard holds.

    Raises:
        ValueError: It is no shard of this format, or not complete.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        body: dict[str, Any] = json.loads(file.read(length))
        size = os.fstat(file.fileno()).st_size
    metadata = body.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    end = 8 + length + max((spec["data_offsets"][1] for spec in body.values()), default=0)
    if size != end:
        raise ValueError(f"{size} bytes, its header promises {end}")
    entries = {key: _about(told) for key, told in json.loads(metadata["entries"]).items()}
    places: dict[str, dict[str, Place]] = {key: {} for key in entries}
    for name, spec in body.items():
        key, _, part = name.rpartition("/")
        offset = 8 + length + spec["data_offsets"][0]
        places[key][part] = Place(tuple(spec["shape"]), DTYPES[spec["dtype"]], offset)
    return Header(entries, places, size)


def read_tensor(descriptor: int, place: Place) -> Tensor:
    """Reads one tensor of an open shard into memory of its own.

    Raises:
        OSError: The file ends before the tensor does, or cannot be read.
    """
    tensor = torch.empty(place.shape, dtype=place.dtype)
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    at = 0
    while at < len(view):
        count = os.preadv(descriptor, [view[at:]], place.offset + at)
        if count == 0:
            raise OSError("the file ends inside a tensor")
        at += count
    return tensor


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the bytes of tensors on the CPU, in the order of their names."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _about(told: dict[str, Any]) -> About:
    origin, detail = told["origin"], told["detail"]
    if origin is not None:
        part = origin.get("part")
        origin = Origin(**{**origin, "part": None if part is None else tuple(part)})
    return About(**{**told, "origin": origin, "detail": None if detail is None else tuple(detail)})
