"""Writes safetensors one tensor at a time, so that memory is needed only for the largest tensor.

Source: huggingface/safetensors@0.8 README, "Format": 8 bytes of header length, JSON header, tensors without
gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sat_train.files import HashingFile, write_file, write_text
from sat_train.weights.lazy import LazyWeights
from sat_train.weights.names import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
Progress = Callable[[int], None]


def unseen(count: int) -> None:
    """Shows no progress."""


def write_safetensors(
    folder: Path,
    stem: str,
    weights: LazyWeights,
    *,
    metadata: Mapping[str, str],
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes weights as `<stem>.safetensors`, or as files with an index if they are too large for one.

    Args:
        folder: An existing folder.
        stem: First part of the file names, e.g. `diffusion_pytorch_model`.
        weights: The weights; read one by one, in order.
        metadata: Texts for the header of every file.
        progress: Called with the bytes of each tensor written.
        max_shard_bytes: Largest size of one file in bytes.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    shards = _split_into_files(weights, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", weights, shards[0], metadata, progress)
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        _write_file(folder / name, weights, keys, metadata, progress)
    index = {
        "metadata": {"total_size": weights.num_bytes},
        "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
    }
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))


def _split_into_files(weights: LazyWeights, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key in weights:
        size = weights.tensors[key].num_bytes
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _write_file(
    path: Path, weights: LazyWeights, keys: list[str], metadata: Mapping[str, str], progress: Progress
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for key in keys:
        lazy = weights.tensors[key]
        end = offset + lazy.num_bytes
        header[key] = {
            "dtype": _DTYPE_NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(file: HashingFile) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in keys:
            data = _bytes(weights[key])
            assert len(data) == weights.tensors[key].num_bytes, f"{key} is not as declared"
            file.write(data)
            progress(len(data))

    write_file(path, write)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
