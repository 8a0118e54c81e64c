"""The order of samples is a pure function of seed and position."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from sat_train.data.sampler import GlobalOrder


def order_of(*sizes, seed=7, **options):
    return GlobalOrder(seed=seed, clip_weights=[[1.0] * size for size in sizes], **options)


def clips(order, positions):
    return [(ref.source, ref.clip) for ref in map(order.clip_ref, positions)]


@pytest.mark.parametrize("size", [1, 2, 7, 54, 1000])
def test_each_epoch_takes_each_clip_once_in_another_order(size):
    order = order_of(size)
    epochs = [clips(order, range(e * size, (e + 1) * size)) for e in range(3)]
    assert order.epoch_length == size
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(size)]
    if size > 5:
        assert epochs[0] != epochs[1] != epochs[2]
    assert [order.clip_ref(e * size).visit for e in range(3)] == [0, 1, 2]


def test_order_depends_on_the_seed_and_on_nothing_asked_before():
    one, other = order_of(20), order_of(20, seed=8)
    assert clips(one, range(40)) != clips(other, range(40))
    backwards = clips(order_of(20), reversed(range(40)))
    assert clips(one, range(40)) == backwards[::-1]
    assert clips(pickle.loads(pickle.dumps(one)), range(40)) == clips(one, range(40))


def test_order_is_the_same_in_every_version():
    """A resumed run must meet the order that it left, whatever numpy it finds."""
    assert [clip for _, clip in clips(order_of(10, seed=1), range(20))] == FROZEN


FROZEN = [7, 1, 8, 3, 0, 4, 9, 6, 5, 2, 5, 0, 7, 4, 1, 9, 6, 2, 8, 3]


def test_sources_without_weights_are_one_set():
    order = order_of(3, 5)
    assert sorted(clips(order, range(8))) == [(0, i) for i in range(3)] + [(1, i) for i in range(5)]
    mixed = [source for source, _ in clips(order_of(50, 50), range(100))]
    assert 0 < mixed[:50].count(0) < 50


def test_without_shuffling_clips_come_as_listed():
    assert clips(order_of(2, 2, shuffle=False), range(6)) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1)]


def test_a_mixture_keeps_its_shares_and_its_sources_epochs():
    order = order_of(10, 40, source_weights=[3.0, 1.0])
    taken = clips(order, range(2000))
    assert Counter(source for source, _ in taken) == {0: 1500, 1: 500}
    for source, size in ((0, 10), (1, 40)):
        own = [clip for s, clip in taken if s == source]
        for begin in range(0, len(own) - size + 1, size):
            assert sorted(own[begin : begin + size]) == list(range(size))


def test_weights_of_clips_are_how_often_an_epoch_takes_them():
    weights = [2.0, 0.5, 1.0, 0.5, 0.25, 1.75]
    order = GlobalOrder(seed=3, clip_weights=[weights])
    assert order.epoch_length == 6
    counts = np.zeros(6)
    for epoch in range(400):
        once = Counter(order.clip_ref(epoch * 6 + i).clip for i in range(6))
        for clip, weight in enumerate(weights):
            assert np.floor(weight) <= once[clip] <= np.ceil(weight)
            counts[clip] += once[clip]
    assert counts / 400 == pytest.approx(weights, abs=0.08)  # three standard errors of a coin at 400 tosses


@pytest.mark.parametrize(
    ("shares", "block"), [((1, 2500), 10_000), ((1, 1, 99_999), 100_000), ((0.5, 3e4), 100_000)]
)
def test_every_share_is_drawn_exactly_however_small(shares, block):
    order = order_of(*([7] * len(shares)), source_weights=list(shares))
    drawn = Counter(source for source, _ in clips(order, range(block)))
    assert [drawn[i] for i in range(len(shares))] == pytest.approx(
        [share / sum(shares) * block for share in shares], abs=1
    )
    assert min(drawn.values()) >= 1
    again = Counter(source for source, _ in clips(order, range(block, 2 * block)))
    assert again == drawn


def test_sources_of_a_mixture_go_through_their_own_epochs_in_every_block():
    order = order_of(7, 7, source_weights=[1, 2500])
    seen = [ref for ref in map(order.clip_ref, range(20_000)) if ref.source == 1]
    assert [ref.visit for ref in seen] == [i // 7 for i in range(len(seen))]
