"""Location of each trained parameter in the tensors that the optimizer steps, at every ZeRO stage.

All private names of DeepSpeed that the trained state depends on are in this module; a test reports those that
a new version has dropped.

Source: microsoft/DeepSpeed@v0.19.8 `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`,
`utils/tensor_fragment.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from sat_train.checkpoint.fragments import PIECE, Fragment
from sat_train.distributed.processes import ProcessMesh
from sat_train.weights.names import Shape


@dataclass(frozen=True)
class Slot:
    """A run of elements of one parameter in a flat tensor of the optimizer.

    Args:
        name: The parameter.
        shape: Its whole shape; under tensor parallelism that of this rank's shard.
        offset: Index of the first element in the flattened parameter.
        flat: fp32: the tensor that the optimizer steps, and the key of its state. A parameter in its shape;
            at stage 3 a vector.
        start: Index of the first element in the flattened `flat`.
        count: Number of elements.
    """

    name: str
    shape: Shape
    offset: int
    flat: Tensor
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the elements of this slot in a tensor laid out like `flat`; a view."""
        return tensor.detach().flatten()[self.start : self.start + self.count]


def find_slots(engine: Any, mesh: ProcessMesh) -> list[Slot]:
    """Returns the slots that this rank saves; over the data axis they hold every trained element once.

    Args:
        engine: `deepspeed.DeepSpeedEngine`.
        mesh: The process mesh.
    """
    slots = held_slots(engine, mesh)
    if int(engine.zero_optimization_stage()) == 0:  # every rank holds all elements, and saves an equal share
        slots = [_share(slot, mesh) for slot in slots]
    return [slot for slot in slots if slot.count]


def held_slots(engine: Any, mesh: ProcessMesh) -> list[Slot]:
    """Returns the slots of everything that this rank's optimizer steps."""
    stage = int(engine.zero_optimization_stage())
    if stage in (1, 2):
        return list(engine.optimizer.optimizer.slots)  # `OwnedParameters`
    return _slots(engine, partial(_scattered, mesh) if stage == 3 else _replicated)


def partition_slots(engine: Any) -> list[Slot]:
    """Returns the slots of this rank's partition at stages 1 and 2, which is one vector."""
    return _slots(engine, _partitioned)


def _slots(engine: Any, find: Callable[[Any, str, Any], Iterator[Slot]]) -> list[Slot]:
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return [slot for name, parameter in trained for slot in find(engine, name, parameter) if slot.count]


def _share(slot: Slot, mesh: ProcessMesh) -> Slot:
    size = -(-slot.count // mesh.data_size)
    start = min(size * mesh.data_rank, slot.count)
    return replace(slot, offset=start, start=start, count=min(size, slot.count - start))


def _replicated(engine: Any, name: str, parameter: Any) -> Iterator[Slot]:
    """Yields the slots of stage 0: the optimizer steps the parameters themselves."""
    yield Slot(name, tuple(parameter.shape), 0, parameter, 0, parameter.numel())


def _partitioned(engine: Any, name: str, parameter: Any) -> Iterator[Slot]:
    """Yields the slots of DeepSpeed's own partitions: the group is one vector, a rank has one part of it."""
    link = parameter._hp_mapping
    if link is None:  # wholly in another rank's partition
        return
    flat = engine.optimizer.single_partition_of_fp32_groups[link.param_group_index]
    here, there = link.lp_fragment_address, link.hp_fragment_address
    yield Slot(name, tuple(parameter.shape), here.start, flat, there.start, there.numel)


def _scattered(mesh: ProcessMesh, engine: Any, name: str, parameter: Any) -> Iterator[Slot]:
    """Yields the slots of stage 3: each parameter is split over the ranks, which concatenate their pieces."""
    optimizer: Any = engine.optimizer
    group, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    offset = padded * mesh.data_rank
    count = max(0, min(padded, int(parameter.ds_numel) - offset))
    flat = optimizer.fp32_partitioned_groups_flat[group]
    yield Slot(name, tuple(parameter.ds_shape), offset, flat, int(start), count)


def held_piece(name: str, tensor: Any, mesh: ProcessMesh) -> Fragment | None:
    """Returns what this rank holds of a weight at stage 3, a view; None where that is nothing.

    What is not divided belongs to the first data rank, and so does the beginning of each weight.
    """
    held = getattr(tensor, "ds_tensor", None)
    shape, whole = (tensor.shape, tensor) if held is None else (tensor.ds_shape, held)
    offset = (math.prod(shape) if held is None else int(held.ds_numel)) * mesh.data_rank
    count = max(0, min(whole.numel(), math.prod(shape) - offset))  # the last pieces are padded
    if mesh.data_rank and not count:
        return None
    return Fragment(name, tuple(shape), offset, {PIECE: whole.detach().flatten()[:count]})


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Returns the optimizer of the run, under those that DeepSpeed drives."""
    stage, optimizer = int(engine.zero_optimization_stage()), engine.optimizer
    if stage == 0:
        return cast(torch.optim.Optimizer, optimizer.inner)
    return cast(torch.optim.Optimizer, optimizer.optimizer if stage == 3 else optimizer.optimizer.inner)


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Updates the weights of the forward pass from the fp32 masters, after these have been written.

    Ranks: all.
    """
    optimizer: Any = engine.optimizer
    stage = int(engine.zero_optimization_stage())
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False  # it would keep the replaced states
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones stay gathered, and would stay stale
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
