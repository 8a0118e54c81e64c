"""Collectives of the project. At world size 1 none of them touches the process group."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError, SatTrainError

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_MEETING = "sat_train/meeting"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0


def on_rank_0(mesh: ProcessMesh, function: Callable[[], T], *, may_take_long: bool = False) -> T:
    """Runs `function` on rank 0 and returns or raises its outcome on all ranks.

    A rank that raised alone would leave the others waiting in their next collective.

    Args:
        mesh: The process mesh.
        function: Called on rank 0 only; its result must be picklable.
        may_take_long: Wait without a timeout, because `function` reads or hashes large files.

    Raises:
        SatTrainError: On all ranks alike: the error of `function`, or a description of its OSError.

    Ranks: all.
    """
    outcome: tuple[T | None, SatTrainError | None] = (None, None)
    if mesh.rank == 0:
        try:
            outcome = (function(), None)
        except SatTrainError as error:
            outcome = (None, error)
        except OSError as error:
            outcome = (None, _describe_os_error(error))
    if may_take_long:
        wait_for_ranks(mesh)
    result, failure = broadcast_object(mesh, outcome)
    if failure is not None:
        failure.ranks_agree = True
        raise failure
    return result  # type: ignore[return-value]


def _describe_os_error(error: OSError) -> CheckpointError:
    """Returns an error that tells the user what to do."""
    return CheckpointError(
        f"{error.filename or 'a file'}: {error.strerror or error}",
        remedy="check that the disk has room and that the run directory is writable",
    )


def wait_for_ranks(mesh: ProcessMesh) -> None:
    """Waits until all ranks have called this, however long that takes.

    If a rank has failed, `FailureBoard` ends those that wait.

    Ranks: all.
    """
    if mesh.world_size == 1:
        return
    arrived = mesh.store.add(_MEETING, 1)
    total = -(-arrived // mesh.world_size) * mesh.world_size  # of this meeting and all before it
    wait_until(lambda: mesh.store.add(_MEETING, 0) >= total)


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls a condition at growing intervals until it holds."""
    pause = _FIRST_PAUSE_S
    while not condition():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@contextmanager
def in_turn_on_this_machine(mesh: ProcessMesh, work: str) -> Iterator[None]:
    """Lets the ranks of a machine do some work one after the other, in the order in which they come.

    Args:
        mesh: The process mesh.
        work: Name of the work.

    Ranks: any.
    """
    key = f"sat_train/turn/{work}/{socket.gethostname()}"
    place = mesh.store.add(key, 1)
    wait_until(lambda: mesh.store.add(f"{key}/done", 0) >= place - 1)
    try:
        yield
    finally:
        mesh.store.add(f"{key}/done", 1)


def broadcast_object(mesh: ProcessMesh, value: T | None) -> T:
    """Returns rank 0's value on every rank.

    Args:
        value: Picklable value to send; ignored on other ranks.

    Ranks: all.
    """
    if mesh.world_size == 1:
        return value  # type: ignore[return-value]
    values = [value]
    dist.broadcast_object_list(values, src=0, device=mesh.device)
    return values[0]  # type: ignore[return-value]


def gather_objects(mesh: ProcessMesh, value: T) -> list[T]:
    """Returns every rank's value, in rank order, on every rank.

    Ranks: all.
    """
    if mesh.world_size == 1:
        return [value]
    values: list[T | None] = [None] * mesh.world_size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def gather_pixels(mesh: ProcessMesh, pixels: Mapping[K, torch.Tensor]) -> list[dict[K, torch.Tensor]]:
    """Returns the pictures of every rank, in rank order, on rank 0, and nothing on the others.

    Pixels are sent as tensors; only their keys and shapes are pickled.

    Args:
        mesh: The process mesh.
        pixels: uint8 tensors of any shapes on the CPU, by a small key.

    Ranks: all.
    """
    if mesh.world_size == 1:
        return [dict(pixels)]
    shapes = gather_objects(mesh, {key: tuple(each.shape) for key, each in pixels.items()})
    longest = max(sum(map(math.prod, each.values())) for each in shapes)
    ours = torch.zeros(longest, dtype=torch.uint8, device=mesh.device)
    flat = [each.flatten() for each in pixels.values()]
    if flat:
        together = torch.cat(flat)
        ours[: len(together)].copy_(together)
    rows = [torch.empty_like(ours) for _ in shapes] if mesh.rank == 0 else None
    if longest:
        dist.gather(ours, rows)
    return [_split(row.cpu(), each) for row, each in zip(rows or [], shapes, strict=False)]


def _split(row: torch.Tensor, shapes: Mapping[K, tuple[int, ...]]) -> dict[K, torch.Tensor]:
    pieces = row[: sum(map(math.prod, shapes.values()))].split([math.prod(each) for each in shapes.values()])
    return {key: piece.view(shapes[key]) for key, piece in zip(shapes, pieces, strict=True)}


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


def sum_over_ranks(mesh: ProcessMesh, values: torch.Tensor) -> torch.Tensor:
    """Replaces values by their sum over all ranks, in place.

    Ranks: all.
    """
    if mesh.world_size > 1:
        dist.all_reduce(values)
    return values


def check_all_ranks(mesh: ProcessMesh, error: SatTrainError | None) -> None:
    """Raises on every rank if any rank has an error: its own error, or that of the first rank with one.

    So a bad file on one rank ends all ranks at the same point, and none waits for a peer that has left.

    Args:
        error: The error of this rank, or None.

    Raises:
        SatTrainError: With the text and the exit code of that error.

    Ranks: all.
    """
    errors = gather_objects(mesh, None if error is None else (str(error), error.exit_code))
    for rank, other in enumerate(errors):
        if other is not None:
            message, exit_code = other
            failure = error or SatTrainError(f"rank {rank}: {message}")
            failure.exit_code = exit_code
            failure.ranks_agree = True
            raise failure
