"""Writes tensors as `torch.save` does: those that are in memory, or whole ones put together one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from sat_train.files import HashingFile
from sat_train.weights.lazy import LazyTensor, LazyWeights


def write_tensors(content: Mapping[str, Any], file: HashingFile) -> None:
    """Writes plain values and tensors."""
    with _saving_fast():
        torch.save(content, cast(IO[bytes], file))


def write_lazily(key: str, weights: LazyWeights, file: HashingFile) -> None:
    """Writes `{key: weights}`, the same bytes as `write_tensors`, with one tensor in memory at a time."""
    filled = _FilledFile(file, weights)
    with _saving_fast(), skip_data():
        torch.save(
            {key: {name: _hollow(lazy) for name, lazy in weights.tensors.items()}}, cast(IO[bytes], filled)
        )
    filled.check()


class _FilledFile:
    """A file that `torch.save` writes without data: where it skips that of a tensor, the tensor is written.

    An error is kept, because C++ would hide it.
    """

    def __init__(self, file: HashingFile, weights: LazyWeights) -> None:
        self._file, self._weights = file, weights
        self._left = [name for name, lazy in weights.tensors.items() if lazy.num_bytes]  # in torch's order
        self._error: Exception | None = None

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def seek(self, count: int, whence: int) -> int:
        """Writes the tensor whose `count` bytes torch skips."""
        try:
            if self._error is None:
                data = self._weights[self._left.pop(0)].contiguous().flatten().view(torch.uint8).numpy()
                assert (data.nbytes, whence) == (count, 1), "torch skips the data of another tensor"
                self._file.write(data)
        except Exception as error:
            self._error = error
        return 0

    def check(self) -> None:
        if self._error is not None:
            raise self._error
        assert not self._left, "torch has written all tensors"


def _hollow(lazy: LazyTensor) -> Tensor:
    """Returns a tensor whose memory is never touched, and so never taken.

    `torch.empty` would fill it where kernels are deterministic.
    """
    strides = torch.empty(lazy.shape, device="meta").stride()
    return torch.empty(0, dtype=lazy.dtype).set_(torch.UntypedStorage(lazy.num_bytes), 0, lazy.shape, strides)


class _Tags(threading.local):
    """Place of tensors that `torch.save` notes, in the thread that writes; empty: where they are."""

    place = ""


_tags = _Tags()
torch.serialization.register_package(0, lambda storage: _tags.place, lambda storage, location: None)


@contextmanager
def _saving_fast() -> Iterator[None]:
    """Leaves out torch's checksum, as there is a SHA-256, and copies from the GPU through pinned memory.

    Tensors are noted as lying on the CPU, so that a file does not depend on the device or on a copy.
    """
    from torch.utils.serialization import config

    checksums, pins = get_crc32_options(), config.save.use_pinned_memory_for_d2h
    set_crc32_options(False)
    config.save.use_pinned_memory_for_d2h = torch.cuda.is_available()
    _tags.place = "cpu"
    try:
        yield
    finally:
        _tags.place = ""
        set_crc32_options(checksums)
        config.save.use_pinned_memory_for_d2h = pins
