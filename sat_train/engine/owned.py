"""The layout of ZeRO stages 1 and 2: each rank owns whole parameters, which its optimizer steps as they are.

DeepSpeed concatenates the parameters and divides the vector into equal partitions. Here the parameters are
ordered and padded so that every boundary falls between two of them, and the optimizer gets views of the
partition of its rank: one that needs matrices computes what it would compute in a single process. Reduction,
clipping, offload and gathering stay DeepSpeed's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sat_train.engine.slots import Slot

_PADDING = "row_padding"
_MULTIPLE = 16  # elements: rows begin where vector instructions and NCCL like it


@contextmanager
def padded_rows(module: nn.Module, ranks: int) -> Iterator[list[nn.Parameter]]:
    """Yields the trained parameters in rows of one length, a row for each rank of the data axis.

    A row that is shorter than the longest ends with padding, a parameter that never gets a gradient. While
    the block runs it has a name in `module`, which DeepSpeed looks up when it is initialized.

    Args:
        module: The transformer, in its dtype.
        ranks: Size of the data axis. One rank needs no padding.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows: list[list[nn.Parameter]] = [[] for _ in range(ranks)]
    sizes = [parameter.numel() for parameter in trained]
    for parameter, owner in zip(trained, owners(sizes, ranks), strict=True):
        rows[owner].append(parameter)
    length = row_length(sizes, ranks)
    padding = nn.ParameterList()
    for row in rows:
        missing = length - sum(parameter.numel() for parameter in row)
        if missing:
            padding.append(nn.Parameter(trained[0].new_zeros(missing)))
            row.append(padding[-1])
    module.add_module(_PADDING, padding)
    try:
        yield [parameter for row in rows for parameter in row]
    finally:
        delattr(module, _PADDING)


def row_length(sizes: Sequence[int], ranks: int) -> int:
    """Returns the elements of each rank's row, padding included, for parameters of these sizes."""
    lengths = [0] * ranks
    for size, owner in zip(sizes, owners(sizes, ranks), strict=True):
        lengths[owner] += size
    return -(-max(lengths) // _MULTIPLE) * _MULTIPLE if ranks > 1 else lengths[0]


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Returns the rank that owns each parameter: the largest first, to the rank that owns least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    result = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], rank))
        result[index] = rank
    return result


class OwnedParameters(torch.optim.Optimizer):
    """DeepSpeed's optimizer at stages 1 and 2: one group, whose partition it hands on as whole parameters.

    Attributes:
        inner: The optimizer of the run, over views of the parameters that this rank owns.
        slots: These views.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__([{"params": parameters}], {"lr": 0.0})
        self.inner: torch.optim.Optimizer
        self.slots: list[Slot] = []
        self._partition: list[Slot] = []

    def bind(
        self, partition: Sequence[Slot], build: Callable[[Mapping[str, Tensor]], torch.optim.Optimizer]
    ) -> None:
        """Builds the inner optimizer, once DeepSpeed has made its partitions.

        Args:
            partition: The slots of this rank's partition.
            build: Returns the optimizer over named parameters; a rank may own none.
        """
        for slot in partition:
            is_whole = slot.offset == 0 and slot.count == math.prod(slot.shape)
            assert is_whole, f"a boundary falls inside {slot.name}"
        self._partition = list(partition)
        self.slots = [replace(slot, flat=nn.Parameter(_view(slot, slot.flat)), start=0) for slot in partition]
        self.inner = build({view.name: view.flat for view in self.slots})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Steps the parameters with the gradient of the partition."""
        for flat, view in zip(self._partition, self.slots, strict=True):
            assert flat.flat.grad is not None, "DeepSpeed sets it before each step"
            view.flat.grad = _view(flat, flat.flat.grad)
        self.inner.step()
        for view in self.slots:
            view.flat.grad = None


def _view(slot: Slot, flat: Tensor) -> Tensor:
    return slot.of(flat).view(slot.shape)
