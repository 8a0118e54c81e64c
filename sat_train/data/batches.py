"""Which samples each rank takes in each micro-step, and where that leaves the run in the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DataPosition:
    """Where a run stands in the global order. The same on all ranks.

    Args:
        next: The first sample that is not looked at yet.
        waiting: Samples before it that are still to come, rising: their bucket has not filled a batch.
    """

    next: int = 0
    waiting: tuple[int, ...] = ()

    @property
    def consumed(self) -> int:
        """Samples that all ranks together have taken."""
        return self.next - len(self.waiting)


@dataclass(frozen=True)
class MicroBatch:
    """What all ranks together take in one micro-step.

    Args:
        indices: Global indices of its samples, of one bucket, rising.
        mine: Those of this rank.
        after: Where the run stands then.
    """

    indices: tuple[int, ...]
    mine: tuple[int, ...]
    after: DataPosition


class OrderedBatches:
    """Batches in global order, all samples of one from the same bucket.

    Samples are looked at in their order. Each waits until as many of its bucket have come as all ranks take
    in a micro-step; then these are taken, rank r the r-th run of them. So every sample is taken once, those
    of one bucket in their order, all ranks have the same shape and as much work, and with one bucket the
    samples of a micro-step are consecutive. Which samples there are does not depend on the number of ranks
    or on the batch size, only when they come does.

    Args:
        batch_sizes: Samples of one rank in a micro-step, for each bucket.
        bucket_of: Bucket of a sample; needed when there are several.
        rank: This rank on the data axis.
        num_ranks: Ranks on the data axis.
        start: Where the run stands.
        stop: Samples from this one on are not wanted; None: there is no end. Later samples of the same
            bucket fill its last batch.
    """

    def __init__(
        self,
        batch_sizes: Sequence[int],
        *,
        bucket_of: Callable[[int], int] = lambda index: 0,
        rank: int = 0,
        num_ranks: int = 1,
        start: DataPosition | None = None,
        stop: int | None = None,
    ) -> None:
        self.start = start or DataPosition()
        self.stop = stop
        self._bucket_of = bucket_of
        self._rank = rank
        self._runs = tuple(batch_sizes)
        self._full = tuple(size * num_ranks for size in batch_sizes)

    def __len__(self) -> int:
        assert self.stop is not None, "the training order has no end"
        return sum(1 for _ in self.plan(self.start))

    def plan(self, position: DataPosition) -> Iterator[MicroBatch]:
        """Yields the micro-batches that follow a position."""
        queues: list[deque[int]] = [deque() for _ in self._full]
        for index in position.waiting:
            queues[self._bucket_of(index)].append(index)
        for bucket in range(len(queues)):  # full ones where fewer ranks go on than have stopped
            while len(queues[bucket]) >= self._full[bucket]:
                yield self._take(queues, bucket, position.next)
        index = position.next
        while self.stop is None or index < self.stop:
            bucket = self._bucket_of(index)
            queues[bucket].append(index)
            index += 1
            if len(queues[bucket]) == self._full[bucket]:
                yield self._take(queues, bucket, index)
        for bucket, queue in enumerate(queues):
            if queue:
                queue.extend(self._fillers(bucket, self._full[bucket] - len(queue), index))
                yield self._take(queues, bucket, index)

    def count_micro_steps(self, num_samples: int) -> int:
        """Returns the micro-steps that the first samples of a run take, the last one of a bucket included."""
        if len(self._full) == 1:
            return -(-num_samples // self._full[0])
        counts = [0] * len(self._full)
        for index in range(num_samples):
            counts[self._bucket_of(index)] += 1
        return sum(-(-count // full) for count, full in zip(counts, self._full, strict=True))

    def _take(self, queues: list[deque[int]], bucket: int, index: int) -> MicroBatch:
        taken = tuple(queues[bucket].popleft() for _ in range(self._full[bucket]))
        run = self._runs[bucket]
        waiting = tuple(sorted(index for queue in queues for index in queue))
        return MicroBatch(
            taken, taken[self._rank * run : (self._rank + 1) * run], DataPosition(index, waiting)
        )

    def _fillers(self, bucket: int, count: int, index: int) -> Iterator[int]:
        while count:
            if self._bucket_of(index) == bucket:
                yield index
                count -= 1
            index += 1


class ListedBatches:
    """Batches of a rank's own list of samples: for work without an order.

    Args:
        indices: Global indices of the samples.
        batch_size: Samples in a batch.
    """

    def __init__(self, indices: Sequence[int], *, batch_size: int = 1) -> None:
        self.start = DataPosition()
        self.stop = len(indices)
        self._indices = tuple(indices)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.stop // self._batch_size)

    def plan(self, position: DataPosition) -> Iterator[MicroBatch]:
        """Yields the batches that follow a position in the list."""
        for first in range(position.next, self.stop, self._batch_size):
            taken = self._indices[first : first + self._batch_size]
            yield MicroBatch(taken, taken, DataPosition(first + len(taken)))
