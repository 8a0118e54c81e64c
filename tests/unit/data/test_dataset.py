"""Samples by global index: windows of real files, captions, crops, substitutes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from sat_train.config.shapes import ClipShape
from sat_train.data.buckets import SampleSpec
from sat_train.data.prepass import chunk_records, look_into
from sat_train.data.sampler import AugmentationKey
from sat_train.errors import DataError
from tests.unit.data.videos import SIDE, dataset_of, numbers_of, record_of, write_numbered


def make(records, **options):
    size, frames = options.pop("video_size", (SIDE, SIDE)), options.pop("max_num_frames", 5)
    return dataset_of(records, shape=ClipShape(frames, *size), **{"max_upscale": 4, **options})


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """Six seconds at 30 frames a second."""
    path = tmp_path_factory.mktemp("clips") / "long.mp4"
    write_numbered(path, num_frames=180, rate=30, gop=30)
    return path


@pytest.mark.parametrize("window", ["head", "center", "random", "uniform"])
def test_frames_keep_the_wanted_pace_in_all_windows(long_clip, window):
    """There is a start such that every frame is within half a source frame of start + i / fps."""
    dataset = make([record_of(long_clip)], window=window)
    for index in range(6):
        sample = dataset[index].sample
        late = [time - i / 8 for i, time in enumerate(sample.times)]
        assert max(late) - min(late) <= 1 / 30 + 1e-6
        assert [round(time * 30) for time in sample.times] == numbers_of(sample.video_tchw)
    if window == "head":
        assert sample.times[0] == 0
    if window == "center":
        assert sample.times[0] + sample.times[-1] == pytest.approx(179 / 30, abs=1 / 30)


@pytest.mark.parametrize("window", ["random", "uniform", "chunks"])
def test_every_frame_of_a_long_clip_is_reachable(long_clip, window):
    records = [record_of(long_clip)]
    if window == "chunks":
        records = chunk_records(records[0], look_into(records[0]), SampleSpec((), fps=8), 5)
        assert len(records) == 9
    dataset = make(records, window=window)
    seen = {n for index in range(600) for n in numbers_of(dataset[index].sample.video_tchw)}
    assert seen == set(range(180))


def test_chunks_lie_in_their_own_part(long_clip):
    clip = record_of(long_clip)
    records = chunk_records(clip, look_into(clip), SampleSpec((), fps=8), 5)
    dataset = make(records, window="chunks")
    for record in records:
        frames, *_ = dataset._read(record, AugmentationKey(1, 3), ClipShape(5, SIDE, SIDE))
        assert record.start - 1 / 60 <= frames.times[0]
        assert frames.times[-1] <= record.end + 1 / 60


def test_start_end_and_skipped_frames_are_kept_out(long_clip):
    part = make([record_of(long_clip, start=2.0, end=4.0)], window="random")
    for index in range(30):
        times = part[index].sample.times
        assert times[0] >= 2.0 - 1 / 60
        assert times[-1] <= 4.0 + 1 / 60
    edges = make([record_of(long_clip)], window="uniform", skip_frms_num=3)
    assert edges[0].sample.times[0] == pytest.approx(0.1)
    assert edges[1].sample.times[-1] == pytest.approx(5.9 - 1 / 30, abs=1 / 60 + 1e-6)


def test_a_sample_depends_on_seed_and_index_alone(long_clip):
    records = [record_of(long_clip), record_of(long_clip)]
    one, again, other = make(records), make(records), make(records, seed=2)
    for index in (5, 0, 3):
        a, b = one[index].sample, again[index].sample
        assert torch.equal(a.video_tchw, b.video_tchw)
        assert a.times == b.times
    assert [other[i].sample.times for i in range(4)] != [one[i].sample.times for i in range(4)]
    assert len({one[i].sample.times for i in range(6)}) == 6


def test_one_of_several_captions_is_taken(long_clip):
    dataset = make([replace(record_of(long_clip), captions=("one", "two", "three"))], max_num_frames=1)
    assert {dataset[i].sample.caption for i in range(30)} == {"one", "two", "three"}


def test_a_given_image_is_cut_as_the_clip(long_clip, tmp_path):
    Image.new("RGB", (64, 48), (250, 10, 20)).save(tmp_path / "first.png")
    sample = make([record_of(long_clip, image=tmp_path / "first.png")], images=True)[0].sample
    assert sample.image_chw.shape == (3, SIDE, SIDE)
    assert sample.image_chw[:, 9, 9].tolist() == [250, 10, 20]


def test_text_to_video_opens_no_image(tmp_path, long_clip):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    record = record_of(long_clip, image=tmp_path / "bad.png")
    result = make([record])[0]
    assert not result.failures
    assert result.sample.image_chw is None
    with pytest.raises(DataError, match=r"long.mp4 \(unreadable: its image bad.png: "):
        make([record], images=True)[0]


def test_short_clips_are_padded_or_refused(tmp_path):
    write_numbered(tmp_path / "short.mp4", num_frames=23, rate=30)
    record = record_of(tmp_path / "short.mp4")
    padded = make([record], short_clip="pad", max_num_frames=9, window="head")[0].sample
    assert numbers_of(padded.video_tchw)[:7] == [0, 4, 7, 11, 15, 19, 22]
    assert numbers_of(padded.video_tchw)[7:] == [22, 22]
    assert padded.num_shown == 7
    with pytest.raises(DataError, match=r"none of 1 clips can be used:\n.*short: it gives 7 of 9 frames"):
        make([record], max_num_frames=9)[0]


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    Image.new("RGB", (64, 64), (0, 200, 0)).save(tmp_path / "a.jpg")
    sample = make([record_of(tmp_path / "a.jpg")], max_num_frames=1)[0].sample
    assert sample.video_tchw.shape == (1, 3, SIDE, SIDE)


def test_too_small_pictures_are_replaced_by_other_clips(tmp_path, long_clip):
    write_numbered(tmp_path / "small.mp4", num_frames=30, rate=30, side=16)
    dataset = make([record_of(tmp_path / "small.mp4"), record_of(long_clip)], max_upscale=1.5)
    results = [dataset[i] for i in range(4)]
    assert {result.sample.clip_id for result in results} == {"long.mp4"}
    failures = [failure for result in results for failure in result.failures]
    assert {failure.cause for failure in failures} == {"too small"}
    assert len({failure.sample_index for failure in failures}) == 2
    assert "16x16 (height x width) must be enlarged 2.00 times to cover 32x32" in failures[0].detail


def test_a_substitute_is_chosen_by_the_index_alone(tmp_path, long_clip):
    (tmp_path / "bad.mp4").write_bytes(b"no video at all" * 99)
    records = [record_of(tmp_path / "bad.mp4"), *(record_of(long_clip, start=i / 2) for i in range(4))]
    one = [make(records)[i].sample.times for i in range(10)]
    assert one == [make(records)[i].sample.times for i in range(10)]


def test_a_set_of_bad_clips_ends_the_run(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video at all" * 99)
    with pytest.raises(
        DataError, match=r"none of 1 clips can be used:\n.*bad.mp4 \(unreadable: Invalid data"
    ):
        make([record_of(tmp_path / "bad.mp4")])[0]
