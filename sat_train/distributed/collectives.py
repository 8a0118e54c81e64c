"""The few collectives the project needs. At world size 1 none of them touches the process group."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import SatTrainError

T = TypeVar("T")


def broadcast_object(mesh: ProcessMesh, value: T | None) -> T:
    """Returns rank 0's value on every rank.

    Args:
        value: What to send; looked at on rank 0 only. Must be picklable.

    Ranks: all.
    """
    if mesh.world_size == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, src=0, device=mesh.device)
    return box[0]  # type: ignore[return-value]


def gather_objects(mesh: ProcessMesh, value: T) -> list[T]:
    """Returns every rank's value, in rank order, on every rank.

    Ranks: all.
    """
    if mesh.world_size == 1:
        return [value]
    values: list[T | None] = [None] * mesh.world_size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def max_flags(mesh: ProcessMesh, flags: torch.Tensor) -> torch.Tensor:
    """Replaces each flag by the largest value any rank holds, in place.

    Args:
        flags: [f], any dtype with an order, on `mesh.device`.

    Returns:
        The same tensor.

    Ranks: all.
    """
    if mesh.world_size > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def sum_over_data(mesh: ProcessMesh, values: torch.Tensor) -> torch.Tensor:
    """Replaces values by their sum over the data axis, in place.

    Ranks: all.
    """
    if mesh.data_size > 1:
        dist.all_reduce(values, group=mesh.data_group)
    return values


def check_all_ranks(mesh: ProcessMesh, error: SatTrainError | None) -> None:
    """Raises on every rank when any rank has an error: its own where there is one, else the first rank's.

    So one rank's bad file ends all ranks at the same place, and none waits for a peer that has left.

    Args:
        error: What went wrong on this rank, or None.

    Raises:
        SatTrainError: With the text and the exit code of that error.

    Ranks: all.
    """
    errors = gather_objects(mesh, error and (str(error), error.exit_code))
    for rank, other in enumerate(errors):
        if other is not None:
            message, exit_code = other
            raised = error or SatTrainError(f"rank {rank}: {message}")
            raised.exit_code = exit_code
            raised.ranks_agree = True
            raise raised
