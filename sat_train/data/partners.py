"""Another sample in the place of each sample of a validation, the same one each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from sat_train.data.batches import DataPosition, MicroBatch, OrderedBatches


class PartnerBatches(OrderedBatches):
    """Batches of a finite order, with the partner of each sample in its place.

    A partner is half a round further among the samples of the same bucket: of the same shape, never the
    sample itself where the bucket has two, the same at any number of ranks, and not the next part of the same
    long clip. A sample that is alone in its bucket is its own partner.

    Args:
        batches: The batches of the validation.
        bucket_of: Returns the bucket of a sample.
    """

    def __init__(self, batches: OrderedBatches, bucket_of: Callable[[int], int]) -> None:
        assert batches.stop is not None, "the training order has no end"
        self._batches, self._bucket_of = batches, bucket_of
        self.start, self.stop = batches.start, batches.stop
        self._rounds: dict[int, list[int]] = {}
        for index in range(batches.stop):
            self._rounds.setdefault(bucket_of(index), []).append(index)

    def __len__(self) -> int:
        return len(self._batches)

    def partner(self, index: int) -> int:
        """Returns the partner of a sample; of one after the end, which does not count, any of its shape."""
        around = self._rounds[self._bucket_of(index)]
        place = around.index(index) if index in around else 0
        return around[(place + len(around) // 2) % len(around)]

    def micro_batches(self, position: DataPosition) -> Iterator[MicroBatch]:
        """Yields the micro-batches with the partners of this rank's samples."""
        for batch in self._batches.micro_batches(position):
            yield replace(batch, mine=tuple(map(self.partner, batch.mine)))
