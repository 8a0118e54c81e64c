"""Pace of the sampled frames at every source rate, judged by the number that each frame carries.

Nothing that the reader says of itself is believed: the writer of a file knows when each of its frames is
shown, and a frame's own number says which one a sample holds. SAT_TRAIN_ALL_RATES=1 takes every whole rate.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import struct
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import pytest

from sat_train.data.buckets import SampleSpec
from sat_train.data.prepass import chunk_records, look_into
from tests.unit.data.test_dataset import make
from tests.unit.data.videos import numbers_of, record_of, write_numbered

WHOLE_RATES = range(6, 61) if os.environ.get("SAT_TRAIN_ALL_RATES") else (*range(6, 61, 3), 8, 16, 25, 32, 50)
RATES = [*map(Fraction, WHOLE_RATES), *(Fraction(n, 1001) for n in (24000, 30000, 60000))]
RATES += [Fraction(25, 2), Fraction(15, 2), Fraction(119, 2)]
WINDOWS = ("head", "center", "random", "uniform", "chunks")
PACES = (8, 16)
NUM_FRAMES = 5
SPREAD = (0, 1, 1 / 2, 1 / 4, 3 / 4)  # where the windows of successive `uniform` visits begin, of the slack
HEADER_ROUNDING_S = 1.5e-3  # by which a file's length may be off

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Clip:
    """A written file.

    Args:
        path: The file.
        shown: When each of its frames is shown, in seconds from the first one.
        first_number: What the first frame shows.
        half: Half a frame's duration where all last equally long; None: they do not.
    """

    path: Path
    shown: tuple[float, ...]
    first_number: int = 0
    half: float | None = None

    @property
    def tick(self) -> float:
        """Seconds by which the file's clock and the arithmetic may be off; mkv counts milliseconds."""
        return 1e-3 if self.path.suffix == ".mkv" else 1e-4

    def edges(self, number: int) -> tuple[float, float]:
        """Between which moments no other frame is nearer than this one, nor half a frame away."""
        i, end = number - self.first_number, self.half or math.inf
        left = (self.shown[i - 1] + self.shown[i]) / 2 if i else self.shown[0] - end
        right = (self.shown[i] + self.shown[i + 1]) / 2 if i + 1 < len(self.shown) else self.shown[i] + end
        return left, right

    def starts(self, numbers: list[int], fps: float) -> tuple[float, float]:
        """The t0, from lowest to highest, for which each frame i is the one nearest to t0 + i / fps."""
        cells = [self.edges(number) for number in numbers]
        low = max(left - i / fps for i, (left, _) in enumerate(cells))
        return low, min(right - i / fps for i, (_, right) in enumerate(cells))


def write_clip(path: Path, times: list[Fraction], *, shown_from: int = 0, rate=None, **how) -> Clip:
    """Writes frames at the given times; those before number `shown_from` are not meant to be shown."""
    write_numbered(path, times=times, **how)
    moments = tuple(float(time - times[shown_from]) for time in times[shown_from:])
    return Clip(path, moments, shown_from, None if rate is None else float(1 / rate) / 2)


def write_ended(path: Path, rate: Fraction) -> Clip:
    """Writes a file of three seconds whose edit list ends after two."""
    clip = write_clip(path, even_times(rate, 3), rate=rate, shown_from=0)
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12  # version and flags, number of entries, then the first one's length
    (length,) = struct.unpack_from(">I", data, place)
    struct.pack_into(">I", data, place, round(length * 2 / 3))
    path.write_bytes(data)
    return replace(clip, shown=tuple(time for time in clip.shown if time < 2 - 1e-3))


def even_times(rate: Fraction, seconds: float = 2, start: Fraction | int = 0) -> list[Fraction]:
    return [start + i / rate for i in range(math.ceil(seconds * rate))]


def uneven_times(seed: int) -> list[Fraction]:
    """Frames of 8 to 300 ms, single pauses of a second, bursts of 120 frames a second."""
    rng = random.Random(seed)
    times = [Fraction(0)]
    while times[-1] < 3:
        kind = rng.random()
        single = [rng.choice((1500, 3000, 9000, 27000))]
        for gap in [90000] if kind < 0.05 else [750] * 9 if kind < 0.15 else single:
            times.append(times[-1] + Fraction(gap, 90000))
    return times


@pytest.fixture(scope="module")
def even_clips(tmp_path_factory) -> list[Clip]:
    """Two seconds at each rate, with none to three B-frames."""
    root = tmp_path_factory.mktemp("even")
    clips = []
    for i, rate in enumerate(RATES):
        path = root / f"{float(rate):.3f}.mp4"
        moments = write_numbered(
            path, num_frames=math.ceil(2 * rate), rate=rate, options={"bf": str(i % 4), "b_strategy": "0"}
        )
        clips.append(Clip(path, tuple(moments), half=float(1 / rate) / 2))
    return clips


@pytest.fixture(scope="module")
def uneven_clips(tmp_path_factory) -> list[Clip]:
    """Files of variable rate in three containers, with and without B-frames."""
    root = tmp_path_factory.mktemp("uneven")
    names = [f"{seed}.{('mp4', 'mkv', 'mp4', 'ts')[seed % 4]}" for seed in range(12)]
    clips = [
        write_clip(root / name, uneven_times(seed), options={"bf": str(seed % 4), "b_strategy": "0"})
        for seed, name in enumerate(names)
    ]
    fragments = {"movflags": "+frag_keyframe+empty_moov"}
    return [*clips, write_clip(root / "fragments.mp4", uneven_times(12), container_options=fragments)]


@pytest.fixture(scope="module")
def shifted_clips(tmp_path_factory) -> list[Clip]:
    """Files whose clock does not begin at 0, or whose decoding times do not, and trimmed ones."""
    root = tmp_path_factory.mktemp("shifted")
    half, clips = Fraction(1, 2), []
    for rate in (Fraction(24), Fraction(30000, 1001)):
        for name, start, options in (
            ("late.mp4", half, {}),  # an edit list that begins with nothing
            ("late.mov", half, {}),
            ("late.mkv", half, {}),
            ("late.ts", half, {}),
            ("reordered.mp4", 0, {"use_editlist": "0"}),  # B-frames push the first frame off 0
            ("negative.mp4", 0, {"movflags": "+negative_cts_offsets"}),
            ("fragments.mp4", half, {"movflags": "+frag_keyframe+empty_moov"}),
            ("moved.mp4", -half, {"avoid_negative_ts": "make_zero"}),
        ):
            path = root / f"{float(rate):.0f}" / name
            times = even_times(rate, start=start)
            clips.append(write_clip(path, times, rate=rate, container_options=options))
        trimmed = root / f"{float(rate):.0f}" / "trimmed.mp4"  # an edit list that hides what lies before 0
        hidden = sum(time < 0 for time in even_times(rate, start=-half))
        times = even_times(rate, start=-hidden / rate)
        clips.append(write_clip(trimmed, times, rate=rate, shown_from=hidden))
        clips.append(write_ended(root / f"{float(rate):.0f}" / "ended.mp4", rate))
    return clips


def sampled(clip: Clip, window: str, fps: int, **part) -> list[tuple[int, int, list[int]]]:
    """Returns some samples of a clip: its chunk (0 without chunks) of how many, its numbers."""
    skip = part.pop("skip_frms_num", 0)
    records = [record_of(clip.path, **part)]
    if window == "chunks":
        spec = SampleSpec((), fps=fps, skip_frms_num=skip)
        records = [part for r in records for part in chunk_records(r, look_into(r), spec, NUM_FRAMES)]
    dataset = make(records, window=window, fps=fps, max_num_frames=NUM_FRAMES, skip_frms_num=skip)
    return [
        (dataset.order.clip_ref(index).clip, len(records), numbers_of(dataset[index].sample.video_tchw))
        for index in range(max(len(SPREAD), len(records)))
    ]


def legal_starts(
    window: str, first: float, last: float, fps: int, place: tuple[int, int, int]
) -> tuple[float, float]:
    """Where t0 may lie, by the documents. `place`: the sample's number, its chunk's, how many there are."""
    length, (number, chunk, parts) = (NUM_FRAMES - 1) / fps, place
    if window == "chunks":
        first, last = (first + (last - first) * (chunk + i) / parts for i in (0, 1))
    slack = max(0.0, last - first - length)
    fixed = {"head": 0.0, "center": 1 / 2, "uniform": SPREAD[number % len(SPREAD)]}.get(window)
    return (first, first + slack) if fixed is None else (first + fixed * slack,) * 2


def check_pace(clip: Clip, window: str, fps: int, first: float, last: float, **part) -> set[int]:
    """Returns the frames; there is a legal t0 such that each frame i is the nearest to t0 + i / fps."""
    samples = sampled(clip, window, fps, **part)
    for number, (chunk, chunks, numbers) in enumerate(samples):
        if window == "chunks":
            check_count(clip, chunks, last - first, fps)
        low, high = clip.starts(numbers, fps)
        legal = legal_starts(window, first, last, fps, (number, chunk, chunks))
        case = f"{clip.path.name} {window} {fps} {part}: {numbers} for t0 {low:.5f}..{high:.5f} of {legal}"
        assert max(low, legal[0]) <= min(high, legal[1]) + clip.tick, case
    return {number for _, _, numbers in samples for number in numbers}


def check_count(clip: Clip, chunks: int, seconds: float, fps: int) -> None:
    """There are as many chunks as windows without a common frame: its last one may be half a frame late."""
    late = HEADER_ROUNDING_S + (clip.half or 0.0)
    exact = (math.floor((seconds + late + slip) * fps + 1) // NUM_FRAMES for slip in (-clip.tick, clip.tick))
    least, most = exact if clip.half else (math.floor(seconds * fps + 1) // NUM_FRAMES, math.inf)
    assert max(1, least) <= chunks <= max(1, most), f"{clip.path.name}: {chunks} chunks"


@pytest.mark.parametrize("fps", PACES)
@pytest.mark.parametrize("window", WINDOWS)
def test_frames_lie_within_half_a_source_frame_at_every_rate(even_clips, window, fps):
    for clip in even_clips:
        check_pace(clip, window, fps, 0.0, clip.shown[-1])


@pytest.mark.parametrize("window", WINDOWS)
def test_frames_are_the_nearest_at_variable_rates(uneven_clips, window):
    for clip, fps in itertools.product(uneven_clips, PACES):
        check_pace(clip, window, fps, 0.0, clip.shown[-1])


@pytest.mark.parametrize("window", WINDOWS)
def test_a_file_s_clock_may_begin_anywhere(shifted_clips, window):
    for clip, fps in itertools.product(shifted_clips, PACES):
        check_pace(clip, window, fps, 0.0, clip.shown[-1])


@pytest.mark.parametrize("window", WINDOWS)
def test_a_part_of_a_file_keeps_the_pace(even_clips, uneven_clips, shifted_clips, window):
    for clip, fps in zip((*even_clips[::5], *uneven_clips[::3], *shifted_clips[::2]), itertools.cycle(PACES)):
        for end in (1.7, None):
            last = clip.shown[-1] if end is None else min(end, clip.shown[-1])
            check_pace(clip, window, fps, 0.4, last, start=0.4, end=end)


@pytest.mark.parametrize("window", WINDOWS)
def test_skipped_frames_are_out_of_reach_and_the_others_keep_the_pace(even_clips, shifted_clips, window):
    for clip in (*even_clips[3::6], *shifted_clips):
        rate, skip = 1 / (2 * clip.half), 2
        numbers = check_pace(clip, window, 16, skip / rate, clip.shown[-1] - skip / rate, skip_frms_num=skip)
        first = clip.first_number
        assert first + skip <= min(numbers), clip.path.name
        assert max(numbers) < first + len(clip.shown) - skip, clip.path.name


def unseen(path: Path, count: int, window: str, most: int = 1500) -> set[int]:
    """Returns which of a file's frames are in none of many samples."""
    records = [record_of(path)]
    if window == "chunks":
        records = [
            part for r in records for part in chunk_records(r, look_into(r), SampleSpec((), 16), NUM_FRAMES)
        ]
    dataset = make(records, window=window, fps=16, max_num_frames=NUM_FRAMES)
    left = set(range(count))
    for index in range(most):
        left -= set(numbers_of(dataset[index].sample.video_tchw))
        if not left:
            break
    return left


@pytest.mark.parametrize("window", ["random", "uniform", "chunks"])
@pytest.mark.parametrize("rate", [6, Fraction(25, 2), Fraction(24000, 1001), 30, Fraction(119, 2)], ids=str)
def test_every_frame_is_reachable_up_to_the_last(tmp_path, window, rate):
    count = math.ceil(Fraction(5, 4) * rate)
    write_numbered(tmp_path / "a.mp4", num_frames=count, rate=rate)
    assert not unseen(tmp_path / "a.mp4", count, window)


@pytest.mark.parametrize("window", ["random", "uniform", "chunks"])
def test_every_frame_is_reachable_at_a_variable_rate(uneven_clips, window):
    for clip in uneven_clips[1:4:2]:  # mkv and ts; whole rates have shown mp4
        assert not unseen(clip.path, len(clip.shown), window), clip.path.name


def test_the_files_hold_what_their_names_say(even_clips, shifted_clips):
    """Else the laws above would be proved of nothing: frames out of order, clocks that do not begin at 0."""
    reordered, begins = [], {}
    for clip in (*even_clips, *shifted_clips):
        with av.open(str(clip.path)) as container:
            stream = container.streams.video[0]
            times = [(packet.pts, packet.dts) for packet in container.demux(stream) if packet.pts is not None]
            decoded = min(dts for _, dts in times if dts is not None)
            begins[clip.path.name] = float(stream.start_time * stream.time_base), decoded
        if [pts for pts, _ in times] != sorted(pts for pts, _ in times):
            reordered.append(clip)
    assert len(reordered) > len(even_clips) / 2
    assert begins["late.mp4"][0] == pytest.approx(0.5)
    assert begins["reordered.mp4"][0] > 0
    assert begins["trimmed.mp4"][1] < begins["moved.mp4"][1]
    assert b"moof" in next(c.path for c in shifted_clips if c.path.stem == "fragments").read_bytes()
