"""Reads files of weights, lazily and without running code from them.

Anything wrong with a file becomes one error that names it.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sat_train.errors import CheckpointError
from sat_train.files import open_regular, read_text, refuse_packed
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, lazy_tensor
from sat_train.weights.names import SAFETENSORS_DTYPES

# Classes in SwissArmyTransformer's files besides tensors: numpy's random state.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SAT_CLASSES: list[Any] = [
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    type(np.dtype("uint32")),
]
# Keys under which a checkpoint of SAT or Lightning keeps its state dict.
_WRAPPERS = ("module", "state_dict")
_ZIP_MAGIC = b"PK\x03\x04"
_LFS_MAGIC = b"version https://git-lfs"
_MOST_HEADER_BYTES = 25_000_000  # of a header or an index; 5B's have 0.2 million


def read_weight_files(paths: Sequence[Path]) -> LazyWeights:
    """Opens one file of weights, or the shards of one set.

    Args:
        paths: safetensors or torch files; the contents decide which.

    Raises:
        CheckpointError: A file is damaged, holds code or quantised tensors, or two files hold the same name.
    """
    lazy_tensors: dict[str, LazyTensor] = {}
    for path in paths:
        tensors = _read_safetensors(path) if is_safetensors(path) else _read_torch(path)
        duplicates = lazy_tensors.keys() & tensors.keys()
        if duplicates:
            raise CheckpointError(
                f"{path} holds {sorted(duplicates)[0]}, and so does another file of the same set"
            )
        lazy_tensors.update(tensors)
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    if not lazy_tensors:
        raise CheckpointError(f"{where} holds no tensors", expected="weights", remedy="give another path")
    return LazyWeights(lazy_tensors, where=where)


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is in the safetensors format, judging by its first bytes.

    Raises:
        CheckpointError: It cannot be read, or is a placeholder for a file that was never downloaded.
    """
    try:
        with open_regular(path) as file:
            head = file.read(max(len(_LFS_MAGIC), 9))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", expected="a file of weights"
        ) from error
    if not head:
        raise CheckpointError(f"{path} is empty", expected="a file of weights", remedy="download it again")
    if head.startswith(_LFS_MAGIC):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights", remedy="run git lfs pull in that folder"
        )
    # No other format starts so: the first eight bytes of a zip file or a pickle are a far larger number.
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < _MOST_HEADER_BYTES


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata in the header of a safetensors file; none for any other file."""
    if not is_safetensors(path):
        return {}
    with _understanding(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _understanding(path: Path) -> Iterator[None]:
    """Converts any exception while a file of weights is read into an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise damaged(path, error) from error


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    with _understanding(path):
        _check_names(path)
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    for key, (_, dtype) in kinds.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise _wrong_dtype(path, key, dtype)
    return {
        key: LazyTensor(shape, SAFETENSORS_DTYPES[dtype], partial(_read_safetensor, path, key, shape))
        for key, (shape, dtype) in kinds.items()
    }


def _check_names(path: Path) -> None:
    """Refuses a header that repeats a name, because readers differ in which one they take."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values: dict[str, object] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"the header names {name} twice")
            values[name] = value
        return values

    with open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=unique)


def _read_safetensor(path: Path, key: str, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
    """Opens the file for one tensor only, so that its memory mapping is freed with the tensor."""
    with _understanding(path), safe_open(path, framework="pt") as file:
        if shard is None:
            return cast(Tensor, file.get_tensor(key))
        part = file.get_slice(key)
        indices = [(*[slice(None)] * shard.dim, slice(*span)) for span in shard.spans(shape[shard.dim])]
        pieces = [part[index] for index in indices]
    return torch.cat(pieces, shard.dim)


def _read_torch(path: Path) -> dict[str, LazyTensor]:
    tensors = _find_tensors(load_torch_file(path))
    if tensors is None:
        raise CheckpointError(
            f"{path} holds no state dict",
            expected="tensors by name, at its top or under 'module' or 'state_dict'",
        )
    for key, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise _wrong_dtype(path, key, str(tensor.dtype).removeprefix("torch."))
        check_plain(path, key, tensor)
    return {key: lazy_tensor(tensor) for key, tensor in tensors.items()}


def check_plain(path: Path, key: str, tensor: Tensor) -> None:
    """Checks that a tensor is dense and that all of its values are in the file.

    Raises:
        CheckpointError: It is sparse, has no data, or claims more values than the file holds (expanded).
    """
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"of shape {list(tensor.shape)}, expanded from fewer values than it has"
        raise CheckpointError(
            f"{path}: {key} is {kind if is_dense else 'sparse or without data'}",
            expected="dense tensors, every value of which is in the file",
            remedy="save the state dict again with .contiguous() tensors",
        )


def check_all_plain(path: Path, state: Any, key: str = "") -> None:
    """Checks every tensor inside dictionaries and lists as `check_plain` does."""
    if isinstance(state, Tensor):
        check_plain(path, key, state)
    elif isinstance(state, Mapping | list | tuple):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for name, value in items:
            check_all_plain(path, value, f"{key}.{name}".removeprefix("."))


def load_torch_file(path: Path) -> Any:
    """Loads a file that `torch.save` wrote; its tensors are memory-mapped if the format allows.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is damaged, would run code, or unpacks to more than its size.
    """
    with _understanding(path):
        refuse_packed(path)
        with open_regular(path) as file:
            mapped = file.read(4) == _ZIP_MAGIC
        try:
            with torch.serialization.safe_globals(_SAT_CLASSES):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            if "Unsupported" not in str(error) and "GLOBAL" not in str(error):
                raise
            raise CheckpointError(
                f"{path} holds more than tensors; loading it would run code from it: {_first_line(error)}",
                expected="tensors and plain values only",
                remedy="where you trust it, save its state dict alone, preferably as safetensors",
            ) from error


def read_index(path: Path) -> list[Path]:
    """Returns the shards that a `*.index.json` names.

    Raises:
        CheckpointError: The index is damaged, or shards are missing (named in the message).
    """
    with _understanding(path):
        weight_map = json.loads(read_text(path, limit=_MOST_HEADER_BYTES))["weight_map"]
        names = sorted(set(weight_map.values()))
        is_outside = any(Path(name).name != name for name in names)
        missing = [] if is_outside else [name for name in names if not (path.parent / name).is_file()]
    if is_outside:
        raise CheckpointError(
            f"{path} names shards outside its folder", expected="file names without a folder"
        )
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:5])}",
            remedy="download the missing files",
        )
    return [path.parent / name for name in names]


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Returns the error for a file that cannot be parsed."""
    return CheckpointError(
        f"{path} is damaged or not a file of weights: {_first_line(error)}",
        expected="safetensors, or a file that torch.save wrote",
        remedy="download or copy it again and compare its size",
    )


def _first_line(error: Exception) -> str:
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def _find_tensors(state: Any) -> dict[str, Tensor] | None:
    """Returns the tensors of a state dict, which SAT or Lightning may have wrapped."""
    for _ in range(2):
        if not isinstance(state, Mapping):
            return None
        inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    return {
        key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)
    } or None


def _wrong_dtype(path: Path, key: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key} is {dtype}",
        expected="float32, float16 or bfloat16",
        remedy="use the original weights; quantised ones cannot be trained",
    )
