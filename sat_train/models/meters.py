"""Meters of what operations keep, move and compute; they also run on the meta device, without memory.

Every tensor that our own code makes is counted while it lives. Attention counts as a flash kernel's does.
Not counted: workspaces of libraries, fragmentation.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_NOT_MOVING = ("mm", "addmm", "bmm", "baddbmm", "_unsafe_view")  # their time depends on arithmetic


class LivingTensors(TorchDispatchMode):
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
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


class Traffic(TorchDispatchMode):
    """Adds up the bytes that elementwise operations read and write, and those of sums over ranks.

    Attributes:
        moved: The bytes so far.
        summed: Those of tensors that are summed over the ranks of a model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "allreduce_":
            self.summed += bytes_in(args[0])
            return result
        if func.is_view or name in _NOT_MOVING or "empty" in name or "attention" in name:
            return result
        read = bytes_in(args[1:] if name == "copy_" else args)
        self.moved += bytes_in(result) + (0 if "zeros" in name or "fill" in name else read)
        if name == "native_layer_norm" and not args[0].is_contiguous():
            self.moved += 2 * bytes_in(args[0])  # its kernel makes a contiguous copy first
        return result


class FlopMeter(TorchDispatchMode):
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.by_operation[str(func.overloadpacket)] += formula(*args, **(kwargs or {}), out_val=result)
        return result


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
