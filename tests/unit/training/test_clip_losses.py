"""Means over clips and their intervals: what two validations say about each other."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from sat_train.training.loop.clip_losses import ClipLosses, estimate_means


def drawn(seed: int, clips: int, *, spread: float = 1.0) -> ClipLosses:
    rng = np.random.default_rng(seed)
    rows = 1 + spread * rng.exponential(size=(clips, 3))
    clips = {f"clip{number}": tuple(row) for number, row in enumerate(rows.tolist())}
    return ClipLosses((100, 500, 900), clips)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        (estimate,) = estimate_means(rng.normal(3.0, 2.0, size=(48, 1)).tolist())
        assert estimate.low < estimate.mean < estimate.high
        covered += estimate.low <= 3.0 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.97  # 95 %, less the little that a percentile bootstrap of 48 lacks


def test_the_order_of_the_clips_changes_no_bit_of_the_mean_and_the_same_losses_give_the_same_interval():
    losses = drawn(0, 31)
    shuffled = list(losses.clips.items())
    random.Random(0).shuffle(shuffled)
    again = ClipLosses(losses.timesteps, dict(shuffled))
    assert again.mean().mean == losses.mean().mean
    for timestep, at in losses.by_timestep().items():
        assert again.by_timestep()[timestep].mean == at.mean
    assert drawn(0, 31).mean() == losses.mean()
    assert drawn(0, 31).by_timestep() == losses.by_timestep()


def test_a_paired_interval_finds_a_change_that_is_lost_in_the_spread_of_the_clips():
    before = drawn(1, 24, spread=2.0)
    rng = np.random.default_rng(2)
    lower = {clip: tuple(x - 0.02 + 0.01 * rng.normal() for x in row) for clip, row in before.clips.items()}
    after = ClipLosses(before.timesteps, lower)
    change = after.minus(before).mean()
    assert change.low < -0.02 < change.high < 0
    assert change.mean == pytest.approx(after.mean().mean - before.mean().mean)
    assert after.mean().low < before.mean().low < after.mean().high, "unpaired it cannot be seen"


def test_clips_that_only_one_has_are_left_out_of_a_pair_and_few_clips_have_no_interval():
    both = ClipLosses((5,), {"a": (1.0,), "b": (3.0,)}).minus(ClipLosses((5,), {"b": (1.0,), "c": (9.0,)}))
    assert both.clips == {"b": (2.0,)}
    alone = both.mean()
    assert alone.mean == 2.0
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert [drawn(4, clips).mean().has_interval for clips in (1, 4, 5, 6)] == [False, False, True, True]


def test_losses_come_back_from_a_file_bit_for_bit():
    losses = drawn(3, 5)
    assert ClipLosses.from_json(json.loads(json.dumps(losses.as_json()))) == losses
