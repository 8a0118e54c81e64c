"""Distributes work of unequal length over ranks, and lets them meet afterwards without a timeout.

A collective fails if a rank is later than `args.distributed_timeout_minutes`. Ranks that have worked on their
own for hours may be further apart than that, so they meet through the store first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from sat_train.distributed.collectives import gather_objects, wait_for_ranks, wait_until
from sat_train.distributed.processes import ProcessMesh

T = TypeVar("T")


class WorkQueue:
    """Hands out the numbers of work items, each once, to the rank that asks next.

    Ranks that share a model get the same numbers.

    Args:
        mesh: The process mesh.
        name: Name of the work, unique in the run.
        size: Number of items.

    Ranks: all create it; each takes from it independently.
    """

    def __init__(self, mesh: ProcessMesh, name: str, size: int) -> None:
        self._mesh, self._size = mesh, size
        self._key = f"sat_train/work/{name}"
        self._turn = 0
        self._counts = {"taken": 0, "finished": 0}

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        """Yields the numbers for this rank until none are left."""
        while (number := self.take()) is not None:
            yield number

    def take(self) -> int | None:
        """Returns the next number, or None if none are left."""
        self._turn += 1
        key = f"{self._key}/{self._mesh.data_rank}/{self._turn}"
        if self._mesh.model_rank == 0:
            number = self._add("taken", 1) - 1
            if self._mesh.model_size > 1:
                self._mesh.store.set(key, str(number))
        else:
            wait_until(lambda: self._mesh.store.check([key]))
            number = int(self._mesh.store.get(key))
        return number if number < self._size else None

    def close(self) -> None:
        """Stops handing out numbers, to any rank."""
        self._add("taken", self._size)

    def finish_one(self) -> None:
        """Counts an item as done."""
        self._add("finished", 1)

    def num_finished(self) -> int:
        """Returns the number of items that all ranks have done."""
        return self._add("finished", 0)

    def _add(self, name: str, count: int) -> int:
        if self._mesh.world_size > 1:
            return self._mesh.store.add(f"{self._key}/{name}", count)
        self._counts[name] += count
        return self._counts[name]


def gather_after_work(mesh: ProcessMesh, value: T) -> list[T]:
    """Gathers every rank's value, in rank order, on every rank, after work of very unequal length.

    Ranks: all.
    """
    wait_for_ranks(mesh)
    return gather_objects(mesh, value)
