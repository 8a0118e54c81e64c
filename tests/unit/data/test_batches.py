"""Which samples each rank takes: each once, of one bucket in a micro-step, whatever the number of ranks."""

from __future__ import annotations

import itertools

import pytest

from sat_train.data.batches import DataPosition, OrderedBatches


def taken_by(rank, size, batch, **options):
    batches = OrderedBatches([batch], rank=rank, num_ranks=size, **options)
    return (micro.mine for micro in batches.micro_batches(batches.start))


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
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7])
def test_every_sample_is_taken_once_in_the_same_order_at_any_batch_size(size, batch):
    ranks = [taken_by(rank, size, batch) for rank in range(size)]
    micro_steps = itertools.islice(zip(*ranks, strict=True), 30)
    taken = list(itertools.chain.from_iterable(mine for micro in micro_steps for mine in micro))
    assert taken == list(range(30 * size * batch))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("stop", [1, 12, 13])
def test_a_finite_iteration_gives_every_rank_as_many_batches(size, stop):
    ranks = [list(taken_by(rank, size, 2, stop=stop)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {len(OrderedBatches([2], num_ranks=size, stop=stop))}
    taken = sorted(index for batches in ranks for batch in batches for index in batch)
    assert taken == list(range(len(taken)))
    assert stop <= len(taken) < stop + 2 * size


# What follows is about several buckets. The bucket of a sample is drawn once, rare ones included.
SIZES = (3, 1, 4, 2)


def bucket_of(index):
    return (0, 0, 0, 1, 0, 2, 0, 0, 3, 0, 0, 2)[(index * 7 + index // 12) % 12]


def of_ranks(num_ranks, start=None, **options):
    return [
        OrderedBatches(SIZES, bucket_of=bucket_of, rank=rank, num_ranks=num_ranks, start=start, **options)
        for rank in range(num_ranks)
    ]


def plans(batches, position=None):
    return [each.micro_batches(position or each.start) for each in batches]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_all_ranks_take_the_same_bucket_and_as_many_samples(num_ranks):
    for micros in itertools.islice(zip(*plans(of_ranks(num_ranks)), strict=True), 60):
        assert {micro.indices for micro in micros} == {micros[0].indices}
        assert {micro.after for micro in micros} == {micros[0].after}
        buckets = {bucket_of(index) for index in micros[0].indices}
        assert len(buckets) == 1
        assert all(len(micro.mine) == SIZES[buckets.pop()] for micro in micros[:1])
        assert tuple(index for micro in micros for index in micro.mine) == micros[0].indices


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_each_sample_comes_once_and_those_of_a_bucket_in_their_order(num_ranks):
    taken = {bucket: [] for bucket in range(len(SIZES))}
    for micro in itertools.islice(plans(of_ranks(num_ranks))[0], 200):
        taken[bucket_of(micro.indices[0])] += micro.indices
        everything = sorted(itertools.chain(*taken.values()))
        assert everything == sorted(set(range(micro.after.next)) - set(micro.after.waiting))
        assert micro.after.consumed == len(everything)
    for indices in taken.values():
        assert indices == sorted(indices)


def test_few_samples_wait():
    """No more than a bucket lacks to be full: nothing is put off for long."""
    for micro in itertools.islice(plans(of_ranks(3))[0], 200):
        waiting = [bucket_of(index) for index in micro.after.waiting]
        assert all(waiting.count(bucket) < 3 * size for bucket, size in enumerate(SIZES))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (4, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("stopped_after", [1, 7, 50])
def test_a_position_resumes_anywhere_with_any_number_of_ranks(before, after, stopped_after):
    first = list(itertools.islice(plans(of_ranks(before))[0], stopped_after))
    position = first[-1].after
    second = list(itertools.islice(plans(of_ranks(after, start=position))[0], 80))
    if before == after:
        straight = list(itertools.islice(plans(of_ranks(before))[0], stopped_after + 80))
        assert first + second == straight
    taken = [index for micro in first + second for index in micro.indices]
    assert len(taken) == len(set(taken))
    end = second[-1].after
    assert sorted(taken) == sorted(set(range(end.next)) - set(end.waiting))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("stop", [1, 12, 31])
def test_a_finite_iteration_has_every_sample_once_and_fills_up_with_later_ones(num_ranks, stop):
    ranks = [list(plan) for plan in plans(of_ranks(num_ranks, stop=stop))]
    assert {len(rank) for rank in ranks} == {len(of_ranks(num_ranks, stop=stop)[0])}
    taken = [index for rank in ranks for micro in rank for index in micro.mine]
    assert sorted(index for index in taken if index < stop) == list(range(stop))
    assert len(taken) == len(set(taken))
    for rank in ranks:
        for micro in rank:
            assert len({bucket_of(index) for index in micro.indices}) == 1


def test_the_micro_steps_of_so_many_samples_are_counted():
    def count(goal, start=0):
        return OrderedBatches([4], num_ranks=3, goal=goal).micro_steps_left(DataPosition(start))

    assert [count(goal) for goal in (0, 1, 12, 13)] == [0, 1, 1, 2]
    assert [count(24, start) for start in (0, 12, 13, 24, 36)] == [2, 1, 1, 0, 0]


def test_with_one_bucket_nothing_ever_waits():
    for micro in itertools.islice(OrderedBatches([2], num_ranks=2).micro_batches(DataPosition()), 20):
        assert micro.after.waiting == ()
