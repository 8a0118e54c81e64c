"""Copies of tensors in host memory that outlive the tensors' next update."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sat_train.log import get_logger

log = get_logger(__name__)


class HostCopy:
    """Host memory that takes a copy of a state again and again.

    Whole storages are copied, and each tensor becomes the same view of its storage's copy, so that
    `torch.save` writes the same bytes for both. Memory is allocated for the first copy and reused for the
    next; where tensors come from a GPU it is pinned, so that a copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def missing_bytes(self, tensors: list[Tensor]) -> int:
        """Returns the bytes that a copy of these tensors would have to allocate."""
        sizes = [storage.nbytes() for storage in _storages(tensors).values()]
        held = [buffer.numel() for buffer in self._buffers]
        return 0 if sizes == held else sum(sizes)

    def prepare(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Allocates the memory for copies, which take the place of those before.

        Returns:
            A function for any thread that makes them: copies of the tensors as they are once all work is done
            that the caller has queued on the device by now. Nothing may change the tensors until it returns.

        Raises:
            RuntimeError: There is not enough memory.
        """
        if self.missing_bytes(tensors):
            self._buffers.clear()
            self._buffers += [_host_buffer(storage) for storage in _storages(tensors).values()]
        queued = next((_queued(tensor.device) for tensor in tensors if tensor.is_cuda), None)
        return lambda: self._copied(tensors, queued)

    @torch.no_grad()
    def _copied(self, tensors: list[Tensor], queued: torch.cuda.Event | None) -> list[Tensor]:
        storages = _storages(tensors)
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        copies = {}
        with _own_stream(device, queued):
            for (key, storage), buffer in zip(storages.items(), self._buffers, strict=True):
                source = torch.empty(0, dtype=torch.uint8, device=storage.device)
                buffer.copy_(source.set_(storage), non_blocking=True)
                copies[key] = buffer.untyped_storage()
        return [_same_view(tensor, copies[tensor.untyped_storage()._cdata]) for tensor in tensors]


def _queued(device: torch.device) -> torch.cuda.Event:
    """Returns the end of the work that is queued on the current stream."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def _own_stream(device: torch.device | None, after: torch.cuda.Event | None) -> Iterator[None]:
    """Runs its body on a stream of its own, while the GPU computes, and waits for it; on the CPU as it is."""
    if device is None or after is None:
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def _storages(tensors: list[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Returns the storages of tensors, each once, in their order."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _same_view(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _host_buffer(storage: torch.UntypedStorage) -> Tensor:
    buffer = torch.empty(storage.nbytes(), dtype=torch.uint8)
    if storage.device.type == "cuda" and storage.nbytes():
        _pin(buffer)
    return buffer


def _pin(buffer: Tensor) -> None:
    """Pins memory as it is: torch's own pinned allocations are rounded up to a power of two."""
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)):
        log.debug("%d bytes could not be pinned; copies of them are slower", buffer.numel())
        with contextlib.suppress(RuntimeError):  # the next kernel, which would report that failure as its own
            torch.zeros(1, device="cuda")
        return
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, buffer.data_ptr())
