"""Which moments a sample shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.window import (
    HEADER_ROUNDING_S,
    count_frames,
    count_windows,
    fit_frames,
    split_chunks,
    window_start,
)


@pytest.mark.parametrize(
    ("num", "rate", "fps", "expected"),
    [
        (60, 30, 8, 16),
        (64, 30, 8, 17),
        (61, 30, 8, 17),
        (17, 8, 8, 17),
        (16, 8, 8, 16),
        (12, 6, 8, 16),
        (1, 25, 8, 1),
    ],
)
def test_a_clip_gives_as_many_frames_as_have_a_source_frame_within_half_a_frame(num, rate, fps, expected):
    last = (num - 1) / rate
    assert count_frames(first=0.0, last=last, rate=rate, fps=fps) == expected
    assert (expected - 1) / fps <= last + 0.5 / rate + 1e-9
    assert num == 1 or expected / fps > last + 0.5 / rate + HEADER_ROUNDING_S


def test_short_clips_follow_the_policy():
    assert fit_frames(20, num_frames=17, policy="error") == (17, 17)
    assert fit_frames(11, num_frames=17, policy="pad") == (11, 17)
    for policy in ("error", "skip", "shrink"):
        with pytest.raises(BadClip, match="short: it gives 16 of 17 frames"):
            fit_frames(16, num_frames=17, policy=policy)
    with pytest.raises(BadClip, match="short: it gives 0 of 17"):
        fit_frames(0, num_frames=17, policy="pad")


def test_windows_lie_inside_the_clip():
    limits = {"first": 1.0, "last": 9.0, "length": 2.0}
    assert window_start("head", **limits) == 1.0
    assert window_start("center", **limits) == 4.0
    generator = torch.Generator().manual_seed(0)
    starts = [window_start("random", generator=generator, **limits) for _ in range(200)]
    assert 1.0 <= min(starts) < 1.3
    assert 6.7 < max(starts) <= 7.0


def test_uniform_windows_cover_the_clip_evenly_over_visits():
    starts = [window_start("uniform", first=0.0, last=10.0, length=2.0, visit=v) for v in range(9)]
    assert sorted(starts) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_chunks_are_equal_parts():
    parts = split_chunks(first=0.5, last=10.0, count=4)
    assert len(parts) == 4
    assert parts[0][0] == 0.5
    assert parts[-1][1] == 10.0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert {round(end - begin, 6) for begin, end in parts} == {2.375}
    assert split_chunks(first=0.0, last=1.0, count=1) == [(0.0, 1.0)]


@pytest.mark.parametrize("rate", [6, 8, 12.5, 24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60])
@pytest.mark.parametrize("fps", [8, 16])
def test_every_chunk_gives_the_window_that_it_was_counted_for(rate, fps):
    """For clips of every length: as many chunks as windows without a common frame, and each gives one."""
    for num_frames, num in itertools.product((1, 5, 17, 49), range(1, 200)):
        first = 0.04
        last = first + (num - 1) / rate
        available = count_frames(first=first, last=last, rate=rate, fps=fps)
        count = count_windows(available, num_frames)
        assert count == max(1, available // num_frames)
        if available < num_frames:
            continue
        for begin, end in split_chunks(first=first, last=last, count=count) if count > 1 else [(first, last)]:
            assert count_frames(first=begin, last=end, rate=rate, fps=fps) >= num_frames, (num_frames, num)
        assert count * num_frames <= available < (count + 1) * num_frames


@pytest.mark.parametrize(
    ("frames", "num_frames", "windows"), [(98, 49, 2), (34, 17, 2), (51, 17, 3), (97, 49, 1)]
)
def test_a_clip_of_exactly_some_windows_gives_all_of_them(frames, num_frames, windows):
    available = count_frames(first=0.0, last=(frames - 1) / 8, rate=8, fps=8)
    assert count_windows(available, num_frames) == windows
