"""Meters of what operations keep, move and compute; they also run on the meta device, without memory.

Every tensor that our own code makes is counted while it lives. Attention counts as a flash kernel's does.
Not counted: workspaces of libraries, fragmentation.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sat_train.models.meta_outputs import run_on_meta

T = TypeVar("T")
_NOT_MOVING = ("mm", "addmm", "bmm", "baddbmm", "_unsafe_view")  # their time depends on arithmetic


class OperationMeter(TorchDispatchMode):
    """Runs each operation, and counts it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = run_on_meta(func, args, kwargs or {})
        self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Counts an operation that has run."""
        raise NotImplementedError


class LivingTensors(OperationMeter):
    """Counts the bytes of all storages that operations make, as long as each lives.

    Args:
        apart_from: A module whose weights are not counted: operations return views of them.
        others: Further tensors that are not counted.

    Attributes:
        now: The bytes that live.
        peak: The most bytes that lived at once.
    """

    def __init__(self, apart_from: nn.Module, *others: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        weights = (*apart_from.parameters(), *apart_from.buffers(), *others)
        self._weights = [tensor.untyped_storage() for tensor in weights]
        self._known.update(storage._cdata for storage in self._weights)

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Counts the storages that an operation has made."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count_storage(tensor.untyped_storage())

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Traffic(OperationMeter):
    """Adds up the bytes that elementwise operations read and write, and those of sums over ranks.

    Attributes:
        moved: The bytes so far.
        summed: Those of tensors that are summed over the ranks of a model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.summed = 0

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds what an operation reads and writes."""
        name = func.overloadpacket.__name__
        if name == "allreduce_":
            self.summed += bytes_in(args[0])
            return
        if func.is_view or name in _NOT_MOVING or "empty" in name or "attention" in name:
            return
        read = bytes_in(args[1:] if name == "copy_" else args)
        self.moved += bytes_in(result) + (0 if "zeros" in name or "fill" in name else read)
        if name == "native_layer_norm" and not args[0].is_contiguous():
            self.moved += 2 * bytes_in(args[0])  # its kernel makes a contiguous copy first


class FlopMeter(OperationMeter):
    """Adds up FLOPs by torch's formulas, without torch's own counter's decomposition of every operation.

    Attributes:
        by_operation: FLOPs so far, by the operation's name; a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All of them."""
        return self.by_operation.total()

    @property
    def attention(self) -> int:
        """Those of attention, its backward included."""
        return self._of_attention("")

    @property
    def attention_backward(self) -> int:
        """Those of attention's backward."""
        return self._of_attention("backward")

    @property
    def linear(self) -> int:
        """Those of matrix products and convolutions."""
        return self.total - self.attention

    def _of_attention(self, word: str) -> int:
        counts = self.by_operation.items()
        return sum(count for name, count in counts if "attention" in name and word in name)

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds an operation's FLOPs."""
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.by_operation[str(func.overloadpacket)] += formula(*args, **kwargs, out_val=result)


@dataclass(frozen=True)
class Stretch:
    """Counts of a stretch of a run.

    Args:
        rise: The most bytes that lived at once, beyond those that lived before it.
        moved: As in `Traffic`.
        summed: As in `Traffic`.
        flops: By operation.
    """

    rise: int
    moved: int
    summed: int
    flops: Counter[str]


class RunMeter(OperationMeter):
    """Counts what a run keeps, moves and computes, all in one.

    Args:
        apart_from: A module whose weights are not counted.
        others: Further tensors that are not counted.

    Attributes:
        living: What lives.
        traffic: What is moved.
        flops: What is computed.
    """

    def __init__(self, apart_from: nn.Module, *others: Tensor) -> None:
        super().__init__()
        self.living, self.traffic, self.flops = LivingTensors(apart_from, *others), Traffic(), FlopMeter()

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Counts an operation in all three."""
        for meter in (self.living, self.traffic, self.flops):
            meter.count(func, args, kwargs, result)

    def stretch(self, run: Callable[[], T]) -> tuple[T, Stretch]:
        """Runs a part of the run, and returns its result and what it counted."""
        living, traffic, flops = self.living, self.traffic, self.flops
        start, peak = living.now, living.peak
        moved, summed, known = traffic.moved, traffic.summed, Counter(flops.by_operation)
        living.peak = start
        result = run()
        stretch = Stretch(
            living.peak - start, traffic.moved - moved, traffic.summed - summed, flops.by_operation - known
        )
        living.peak = max(living.peak, peak)
        return result, stretch

    def repeat(self, stretch: Stretch) -> None:
        """Counts a stretch again; what it leaves behind is made, and counted, by the caller."""
        self.living.peak = max(self.living.peak, self.living.now + stretch.rise)
        self.traffic.moved += stretch.moved
        self.traffic.summed += stretch.summed
        self.flops.by_operation += stretch.flops


def bytes_in(value: Any) -> int:
    """Returns the bytes of the distinct elements of all tensors."""
    if isinstance(value, Tensor):
        sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
        return math.prod(sizes) * value.element_size()
    return sum(map(bytes_in, value)) if isinstance(value, (tuple, list)) else 0


@contextmanager
def flash_attention() -> Iterator[None]:
    """Computes attention by the flash kernel inside, which has a version for the meta device."""
    own = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return out

    F.scaled_dot_product_attention = flash  # type: ignore[assignment]  # modes do not see what is recomputed
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@contextmanager
def no_collectives() -> Iterator[None]:
    """Leaves sums over ranks out inside: tensors on the meta device have no values to add."""
    own = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.distributed.all_reduce = own
