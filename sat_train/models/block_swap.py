"""Frozen weights of blocks in host memory, of which two blocks at a time are on the device.

    swap = BlockSwap(device)
    swap.add(index, tensors)         # of each swapped block, in order
    swap.tensors(index)              # on the device; while the block computes, its neighbour is copied

A forward asks for blocks from the first to the last, a backward from the last to the first, so the neighbour
in that direction is the next: it is copied on a stream of its own, over the block before. Nothing but the
place of weights changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; torch's kernels load vectors
SLOTS = 2  # blocks on the device at a time


@dataclass(eq=False)
class _Slot:
    """Room for one block on the device.

    Args:
        bytes_: The room, uint8.
        block: The block that it holds, or that is being copied; None: no block yet.
        copied: Recorded behind the copy; None on a CPU.
    """

    bytes_: Tensor
    block: int | None = None
    copied: Any = None


@dataclass(frozen=True)
class _Place:
    """Position of a tensor in the bytes of its block."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, block: Tensor) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return block[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(eq=False)
class BlockSwap:
    """Host memory of blocks, and two slots for them on the device.

    Args:
        device: Where blocks compute.
    """

    device: torch.device
    _host: dict[int, Tensor] = field(default_factory=dict)
    _places: dict[int, tuple[_Place, ...]] = field(default_factory=dict)
    _slots: list[_Slot] = field(default_factory=list)
    _current: int | None = None

    def __post_init__(self) -> None:
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(block.numel() for block in self._host.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots."""
        return SLOTS * max((block.numel() for block in self._host.values()), default=0)

    def add(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Copies the weights of a block to host memory.

        Args:
            index: The block; larger than those before it.
            tensors: Its weights.
        """
        assert index > max(self._host, default=-1), "blocks are added in order"
        assert not self._slots, "blocks are added before they compute"
        places, end = [], 0
        for tensor in tensors:
            places.append(_Place(end, tensor.shape, tensor.dtype))
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        # on the meta device, where plans are counted, nothing is allocated
        where = "meta" if self.device.type == "meta" else "cpu"
        block = torch.empty(end, dtype=torch.uint8, device=where, pin_memory=self._stream is not None)
        for place, tensor in zip(places, tensors, strict=True):
            place.of(block).copy_(tensor)
        self._host[index], self._places[index] = block, tuple(places)

    def tensors(self, index: int) -> list[Tensor]:
        """Returns a block's weights on the device; views that hold until the next but one is asked for."""
        if index != self._current:
            self._move_to(index)
        slot = self._slot_of(index)
        assert slot is not None, "it was just copied"
        return [place.of(slot.bytes_) for place in self._places[index]]

    def _move_to(self, index: int) -> None:
        order = list(self._host)
        at, last = order.index(index), len(order) - 1
        is_climbing = at == 0 or (self._current is not None and index > self._current and at < last)
        self._current = index
        slot = self._slot_of(index) or self._copy(index)
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        neighbour = at + 1 if is_climbing else at - 1
        if 0 <= neighbour <= last and self._slot_of(order[neighbour]) is None:
            self._copy(order[neighbour])

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _copy(self, index: int) -> _Slot:
        """Starts the copy of a block into the slot that does not hold the current one."""
        if not self._slots:
            size = self.device_bytes // SLOTS
            rooms = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS))
            self._slots = [_Slot(room) for room in rooms]
        slot = next(slot for slot in self._slots if slot.block is None or slot.block != self._current)
        slot.block = index
        host = self._host[index]
        if self._stream is not None:  # behind what the block before has been asked to compute
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            slot.bytes_[: host.numel()].copy_(host, non_blocking=True)
            slot.copied = self._stream.record_event() if self._stream is not None else None
        return slot


def swapped_blocks(count: int, layers: int) -> frozenset[int]:
    """Returns which blocks to swap: evenly spread, so that those between give each copy its time."""
    return frozenset(index * layers // count for index in range(count))
