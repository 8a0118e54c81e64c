"""What the training losses of single clips say."""

from __future__ import annotations

import random

import pytest

from sat_train.training.callbacks.clip_ledger import name_worst, render_table, summarize_clips


def rows(clips: int = 20, visits: int = 40, *, bad: str = "clip7", factor: float = 2.0):
    """Losses that depend on the timestep over two orders of magnitude, and doubled for one clip."""
    rng, found = random.Random(0), []
    for index in range(clips * visits):
        clip, timestep = f"clip{index % clips}", rng.randrange(1000)
        loss = 10 ** (2 * timestep / 1000) * rng.uniform(0.8, 1.2) * (factor if clip == bad else 1)
        found.append((index, clip, timestep, loss))
    return found


def test_a_clip_that_is_hard_for_its_timesteps_stands_out_and_one_of_hard_timesteps_does_not():
    unlucky = [(10_000 + k, "unlucky", 999, 100.0) for k in range(10)]
    clips = summarize_clips([*rows(), *unlucky])
    assert clips[0].clip == "clip7"
    assert clips[0].ratio == pytest.approx(2.0, rel=0.15)
    by_name = {clip.clip: clip for clip in clips}
    assert by_name["unlucky"].mean > 2 * clips[0].mean
    assert by_name["unlucky"].ratio < 1.5
    assert name_worst(clips) == f"clip7 {clips[0].ratio:.2f}x"
    assert name_worst(summarize_clips(rows(factor=1.0))) == ""


def test_the_table_has_count_mean_and_the_loss_of_the_latest_sample_whatever_the_order_of_the_rows():
    ledger = [(4, "a", 10, 3.0), (0, "a", 20, 1.0), (2, "a, b", 30, 2.0)]
    expected = 'clip,count,mean,last,ratio\na,2,2,3,1\n"a, b",1,2,2,1\n'
    for seed in range(3):
        random.Random(seed).shuffle(ledger)
        assert render_table(summarize_clips(ledger)) == expected
