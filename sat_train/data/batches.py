"""Batches: their samples, their assignment to ranks and micro-steps, and the position in the data."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sat_train.data.sampler import AugmentationKey


@dataclass(frozen=True)
class DataPosition:
    """Position of a run in the global order, the same on all ranks.

    Args:
        next: The first sample that has not been visited.
        waiting: Samples before it, ascending, that are still to come because their bucket has not filled a
            batch.
    """

    next: int = 0
    waiting: tuple[int, ...] = ()

    @property
    def consumed(self) -> int:
        """Samples that all ranks together have taken."""
        return self.next - len(self.waiting)


@dataclass(frozen=True)
class StepPosition:
    """Position of a sample in its optimizer step, for whatever is spread evenly over a step.

    Args:
        step: Distinguishes steps: the samples consumed before it, in units of its size.
        position: Position among the samples of the step, in [0, size).
        size: Samples of the step on all ranks.
    """

    step: int
    position: int
    size: int


@dataclass(frozen=True)
class MicroBatch:
    """The samples that all ranks together take in one micro-step.

    Args:
        indices: Global indices of its samples, of one bucket, ascending.
        mine: The samples of this rank.
        after: Position of the run after it.
        step_positions: Positions of this rank's samples in their optimizer step; empty without steps.
    """

    indices: tuple[int, ...]
    mine: tuple[int, ...]
    after: DataPosition
    step_positions: tuple[StepPosition, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Base of one sample, in any form.

    Args:
        clip_id: Name for messages.
        sample_index: Global position. Key of all randomness.
        num_shown: Frames that the clip gave; the rest repeats the last one.
    """

    clip_id: str
    sample_index: int
    num_shown: int

    def pin_memory(self) -> Sample:
        """Returns the sample in page-locked memory."""
        raise NotImplementedError


@dataclass(frozen=True)
class VideoSample(Sample):
    """One sample as pixels.

    Args:
        video_tchw: Pixels, uint8 RGB.
        caption: Caption.
        image_chw: Pixels of a given conditioning image, uint8; None: the first frame conditions the clip.
        augmentation: Key of everything random about its pixels.
        times: Time of each frame in its file, in seconds.
        training: Whether its conditions are augmented; off in validation and sampling.
        fields: Values of the fields (`data.fields`), by name, of the clip's window, scale and crop. video:
            uint8 [t, 3, h, w]. mask: uint8 0 or 1, [t, 1, h, w]. image: uint8 [3, h, w]. per_frame: float32
            [t, ...]. array: float32 [...]. text: str. pair: uint8 [n, t, 3, h, w].
    """

    video_tchw: Tensor
    caption: str
    image_chw: Tensor | None
    augmentation: AugmentationKey
    times: tuple[float, ...] = ()
    training: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)

    def conditioning_image_chw(self) -> Tensor:
        """Returns the image that conditions the clip: the given one, else the first frame."""
        return self.video_tchw[0] if self.image_chw is None else self.image_chw

    def generator(self, purpose: str) -> torch.Generator:
        """Returns the random generator for one purpose."""
        return self.augmentation.generator(purpose)

    def pin_memory(self) -> VideoSample:
        """Returns the sample in page-locked memory."""
        image = None if self.image_chw is None else self.image_chw.pin_memory()
        fields = {
            name: value.pin_memory() if isinstance(value, Tensor) else value
            for name, value in self.fields.items()
        }
        return replace(self, video_tchw=self.video_tchw.pin_memory(), image_chw=image, fields=fields)


class LoadedBatch(Protocol):
    """The interface of a batch for the training step and the loader."""

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """Clip names, for messages."""

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Global positions, the key of all randomness."""

    def pin_memory(self) -> LoadedBatch:
        """Returns the batch in page-locked memory. PyTorch's loader calls this method by name."""

    def at(self, step_positions: tuple[StepPosition, ...]) -> LoadedBatch:
        """Returns the batch with the positions of its samples in their optimizer step."""


@dataclass(frozen=True)
class SampleBatch:
    """Samples that are taken together; not stacked, because each is encoded separately.

    Args:
        samples: The samples.
        step_positions: Position of each sample in its optimizer step; empty outside training.
    """

    samples: tuple[Sample, ...]
    step_positions: tuple[StepPosition, ...] = ()

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """Clip names, for messages."""
        return tuple(sample.clip_id for sample in self.samples)

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Global positions, the key of all randomness."""
        return tuple(sample.sample_index for sample in self.samples)

    def pin_memory(self) -> SampleBatch:
        """Returns the batch in page-locked memory. PyTorch's loader calls this method by name."""
        return replace(self, samples=tuple(sample.pin_memory() for sample in self.samples))

    def at(self, step_positions: tuple[StepPosition, ...]) -> SampleBatch:
        """Returns the batch with the positions of its samples in their optimizer step."""
        return replace(self, step_positions=step_positions)


class OrderedBatches:
    """Batches in global order; all samples of a batch are from one bucket.

    Samples are visited in global order and queued per bucket. When a queue holds a micro-batch for every rank
    it is emitted; rank r takes the r-th contiguous slice. So every sample is taken once, those of one bucket
    in their order, all ranks have the same shape and the same amount of work, and with one bucket the samples
    of a micro-step are consecutive. The samples do not depend on the number of ranks or the batch size; only
    the time at which they come does.

    At the end of the samples (`goal`, `stop`), waiting samples are taken in smaller micro-batches. If they
    cannot be divided among the ranks, the next samples of their bucket complete them.

    Args:
        batch_sizes: Samples per rank in a micro-batch, for each bucket.
        bucket_of: Returns the bucket of a sample; needed with several buckets.
        rank: This rank on the data axis.
        num_ranks: Ranks on the data axis.
        accumulation: Micro-steps of an optimizer step.
        start: Position of the run, between two optimizer steps.
        goal: All samples before this one are taken before any other that is not needed to complete their
            micro-batches; then the order continues. None: no such goal.
        stop: The same, but the iteration ends there; None: there is no end.
    """

    def __init__(
        self,
        batch_sizes: Sequence[int],
        *,
        bucket_of: Callable[[int], int] = lambda index: 0,
        rank: int = 0,
        num_ranks: int = 1,
        accumulation: int = 1,
        start: DataPosition | None = None,
        goal: int | None = None,
        stop: int | None = None,
    ) -> None:
        assert goal is None or stop is None, "samples end once"
        self.start = start or DataPosition()
        self.stop = stop
        self._end = stop if goal is None else goal
        self._bucket_of = bucket_of
        self._rank = rank
        self._num_ranks = num_ranks
        self._accumulation = accumulation
        self._full = tuple(size * num_ranks for size in batch_sizes)

    def __len__(self) -> int:
        assert self.stop is not None, "the training order has no end"
        return self.micro_steps_left(self.start)

    def micro_batches(self, position: DataPosition) -> Iterator[MicroBatch]:
        """Yields the micro-batches that follow a position between two optimizer steps."""
        taken = self._take_from(position)
        while step := list(itertools.islice(taken, self._accumulation)):
            size, first = sum(len(indices) for indices, _ in step), 0
            for indices, after in step:
                share = len(indices) // self._num_ranks
                mine = slice(self._rank * share, (self._rank + 1) * share)
                positions = range(first, first + len(indices))[mine]
                step_positions = tuple(
                    StepPosition(position.consumed // size, each, size) for each in positions
                )
                yield MicroBatch(indices, indices[mine], after, step_positions)
                first += len(indices)
            position = step[-1][1]

    def indices(self, position: DataPosition, micro_steps: int | None = None) -> list[int]:
        """Returns the samples that all ranks take after a position, over a number of micro-steps or to the
        end.
        """
        micro_batches = itertools.islice(self.micro_batches(position), micro_steps)
        return sorted(index for batch in micro_batches for index in batch.indices)

    def micro_steps_left(self, position: DataPosition) -> int:
        """Returns the number of micro-steps from a position until all samples before `goal` or `stop` are
        taken.
        """
        assert self._end is not None, "the training order has no end"
        count, taken = 0, self._take_from(position)
        while position.next < self._end or any(index < self._end for index in position.waiting):
            _, position = next(taken)
            count += 1
        return count

    def _take_from(self, position: DataPosition) -> Iterator[tuple[tuple[int, ...], DataPosition]]:
        """Yields the samples of each micro-batch and the position after it, which depend on the first
        position alone.
        """
        queues: list[deque[int]] = [deque() for _ in self._full]
        for index in position.waiting:
            queues[self._bucket_of(index)].append(index)
        index = position.next
        while True:
            left = self._count_left(queues) if self._end is not None and index >= self._end else None
            if self.stop is not None and left is not None and not any(left):
                return
            bucket, count = self._find_ready(queues, left)
            if count:
                taken = tuple(queues[bucket].popleft() for _ in range(count))
                waiting = tuple(sorted(index for queue in queues for index in queue))
                yield taken, DataPosition(index, waiting)
            else:
                index = self._look_on(queues, index)

    def _count_left(self, queues: Sequence[deque[int]]) -> list[int]:
        """Returns the number of samples before the end that wait in each bucket."""
        assert self._end is not None
        return [sum(index < self._end for index in queue) for queue in queues]

    def _find_ready(self, queues: Sequence[deque[int]], left: list[int] | None) -> tuple[int, int]:
        """Returns the bucket of the next micro-batch and its size, or size 0 if none is ready."""
        counts: Sequence[int] = self._full
        if left is not None and any(left):
            smallest = [-(-count // self._num_ranks) * self._num_ranks for count in left]
            counts = [min(pair) for pair in zip(self._full, smallest, strict=True)]
        for bucket, count in enumerate(counts):
            if len(queues[bucket]) >= count > 0:
                return bucket, count
        return 0, 0

    def _look_on(self, queues: Sequence[deque[int]], index: int) -> int:
        """Queues the next sample in its bucket; with one bucket, all samples that a micro-batch lacks."""
        if len(queues) > 1:
            queues[self._bucket_of(index)].append(index)
            return index + 1
        count = self._full[0] - len(queues[0])
        if self._end is not None:
            count = max(1, min(count, self._end - index))
        queues[0].extend(range(index, index + count))
        return index + count


class QueuedBatches:
    """Batches of one sample, taken from a queue that all ranks share.

    Args:
        indices: Global indices of the samples of all ranks.
        take: Returns the next position in `indices` that this rank gets; None: there is none left.
    """

    def __init__(self, indices: Sequence[int], take: Callable[[], int | None]) -> None:
        self.start = DataPosition()
        self.stop = len(indices)
        self._indices = tuple(indices)
        self._take = take
        self._taken: list[int] = []

    def __len__(self) -> int:
        return self.stop

    def micro_batches(self, position: DataPosition) -> Iterator[MicroBatch]:
        """Yields the batches after a position: those taken before, then new ones."""
        for number in itertools.count(position.next):
            if number == len(self._taken):
                position_in_indices = self._take()
                if position_in_indices is None:
                    return
                self._taken.append(self._indices[position_in_indices])
            index = (self._taken[number],)
            yield MicroBatch(index, index, DataPosition(number + 1))


Batches = TypeVar("Batches", bound=OrderedBatches | QueuedBatches)
