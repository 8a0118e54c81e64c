"""What remains of a run is what was not consumed: each sample of its epochs comes once."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from sat_train.data.batches import DataPosition, OrderedBatches
from sat_train.data.sampler import GlobalOrder


def make_sides(rng: random.Random, bucket_of, num_buckets: int, **options):
    """Returns the plans of all ranks for a random number of ranks, accumulation and batch sizes."""
    num_ranks, accumulation = rng.randint(1, 5), rng.randint(1, 4)
    sizes = [rng.randint(1, 5) for _ in range(num_buckets)]
    return [
        OrderedBatches(
            sizes,
            bucket_of=bucket_of,
            rank=rank,
            num_ranks=num_ranks,
            accumulation=accumulation,
            **options,
        )
        for rank in range(num_ranks)
    ], accumulation


def take_steps(sides, accumulation: int, position: DataPosition, steps: int) -> tuple[list, DataPosition]:
    """Returns the samples that all ranks take in so many optimizer steps, and where the run stands then."""
    plans = [side.micro_batches(position) for side in sides]
    taken = []
    for micros in itertools.islice(zip(*plans, strict=True), steps * accumulation):
        assert len({len(micro.mine) for micro in micros}) == 1
        assert tuple(itertools.chain.from_iterable(micro.mine for micro in micros)) == micros[0].indices
        taken += micros[0].indices
        position = micros[0].after
    return taken, position


def steps_left(sides, accumulation: int, position: DataPosition) -> int:
    return -(-sides[0].micro_steps_left(position) // accumulation)


@pytest.mark.parametrize("num_buckets", [1, 3, 6])
@pytest.mark.parametrize("seed", range(30))
def test_whatever_ranks_accumulation_and_batches_a_run_had_it_takes_each_sample_of_its_epochs_once(
    num_buckets: int, seed: int
) -> None:
    rng = random.Random(1000 * num_buckets + seed)
    length, epochs = rng.randint(1, 90), rng.randint(1, 3)
    of_clip = [min(int(rng.expovariate(0.8)), num_buckets - 1) for _ in range(length)]
    order = GlobalOrder(seed=seed, clip_weights=[[1.0] * length])

    def bucket_of(index: int) -> int:
        return of_clip[order.clip_ref(index).clip]

    goal, position, taken = epochs * length, DataPosition(), []
    for is_last in (False, False, True):
        sides, accumulation = make_sides(rng, bucket_of, num_buckets, goal=goal)
        left = steps_left(sides, accumulation, position)
        steps = left if is_last else rng.randint(0, left)
        new, position = take_steps(sides, accumulation, position, steps)
        taken += new
        assert steps_left(sides, accumulation, position) == left - steps
    assert len(taken) == len(set(taken)), "a sample came twice"
    assert set(range(goal)) <= set(taken), "a sample of the epochs was not shown"
    counts = Counter(order.clip_ref(index).clip for index in taken if index < goal)
    assert counts == dict.fromkeys(range(length), epochs)
    assert position.consumed == len(taken)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_that_is_resumed_equals_one_that_never_stopped_also_where_samples_end(seed: int) -> None:
    rng = random.Random(seed)
    of_index = [rng.randrange(4) for _ in range(60)]
    sides, accumulation = make_sides(rng, lambda index: of_index[index % 60], 4, goal=45)
    straight, end = take_steps(sides, accumulation, DataPosition(), 30)
    for steps in range(0, 30, 3):
        first, position = take_steps(sides, accumulation, DataPosition(), steps)
        second, resumed_end = take_steps(sides, accumulation, position, 30 - steps)
        assert (first + second, resumed_end) == (straight, end)


def test_on_one_rank_an_epoch_is_exactly_its_clips_rare_shapes_included() -> None:
    """400 clips in three buckets, one of them of 3 clips: 400 samples, each clip once."""
    of_clip = [0] * 260 + [1] * 137 + [2] * 3
    order = GlobalOrder(seed=5, clip_weights=[[1.0] * 400])
    batches = OrderedBatches([4, 4, 16], bucket_of=lambda i: of_clip[order.clip_ref(i).clip], goal=400)
    taken, position = take_steps([batches], 1, DataPosition(), batches.micro_steps_left(DataPosition()))
    assert sorted(order.clip_ref(index).clip for index in taken) == list(range(400))
    assert position == DataPosition(400)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_what_completes_the_last_micro_batches_is_less_than_a_rank_each(num_ranks: int) -> None:
    of_clip = [0] * 260 + [1] * 137 + [2] * 3
    order = GlobalOrder(seed=5, clip_weights=[[1.0] * 400])

    def bucket_of(index: int) -> int:
        return of_clip[order.clip_ref(index).clip]

    batches = OrderedBatches([4, 4, 16], bucket_of=bucket_of, num_ranks=num_ranks, goal=400)
    steps = batches.micro_steps_left(DataPosition())
    taken = [
        index
        for micro in itertools.islice(batches.micro_batches(DataPosition()), steps)
        for index in micro.indices
    ]
    later = Counter(bucket_of(index) for index in taken if index >= 400)
    assert sorted(index for index in taken if index < 400) == list(range(400))
    assert all(count < num_ranks for count in later.values())


@pytest.mark.parametrize("seed", range(20))
def test_the_places_of_a_step_are_all_of_it_once_whatever_the_mode(seed: int) -> None:
    rng = random.Random(seed)
    of_index = [rng.randrange(4) for _ in range(60)]
    sides, accumulation = make_sides(rng, lambda index: of_index[index % 60], 4, goal=rng.choice([None, 70]))
    plans = [side.micro_batches(DataPosition()) for side in sides]
    for _ in range(12):
        micros = [micro for plan in plans for micro in itertools.islice(plan, accumulation)]
        step_positions = [position for micro in micros for position in micro.step_positions]
        assert all(len(micro.step_positions) == len(micro.mine) for micro in micros)
        assert sorted(each.position for each in step_positions) == list(range(len(step_positions)))
        assert {each.size for each in step_positions} == {len(step_positions)}
        assert len({each.step for each in step_positions}) == 1


def test_with_one_shape_a_sample_has_the_place_that_its_index_says() -> None:
    """So that the numbers of runs without buckets are those of the index, at any world size."""
    for num_ranks, size, accumulation in ((1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1)):
        for rank in range(num_ranks):
            batches = OrderedBatches([size], rank=rank, num_ranks=num_ranks, accumulation=accumulation)
            for micro in itertools.islice(batches.micro_batches(DataPosition(24)), 8):
                result = [(each.step, each.position, each.size) for each in micro.step_positions]
                assert result == [(index // 12, index % 12, 12) for index in micro.mine]
