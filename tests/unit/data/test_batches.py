"""Which samples each rank takes: each once, of one bucket in a micro-step, whatever the number of ranks."""

from __future__ import annotations

import itertools

import pytest

from sat_train.data.batches import DataPosition, OrderedBatches


def taken_by(rank, size, batch, **options):
    batches = OrderedBatches([batch], rank=rank, num_ranks=size, **options)
    return (micro.mine for micro in batches.plan(batches.start))


@pytest.mark.parametrize(
    ("size", "batch", "accumulation"), [(1, 6, 2), (2, 3, 2), (3, 2, 2), (4, 3, 1), (1, 12, 1)]
)
def test_a_global_batch_holds_the_same_samples_at_any_world_size(size, batch, accumulation):
    ranks = [taken_by(rank, size, batch, start=DataPosition(24)) for rank in range(size)]
    for step in range(3):
        taken = [next(rank) for _ in range(accumulation) for rank in ranks]
        begin = 24 + step * 12
        assert sorted(itertools.chain(*taken)) == list(range(begin, begin + 12))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("stop", [1, 12, 13])
def test_a_finite_iteration_gives_every_rank_as_many_batches(size, stop):
    ranks = [list(taken_by(rank, size, 2, stop=stop)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {len(OrderedBatches([2], num_ranks=size, stop=stop))}
    taken = sorted(index for batches in ranks for batch in batches for index in batch)
    assert taken == list(range(len(taken)))
    assert stop <= len(taken) < stop + 2 * size
