"""Damaged and odd files: each gives a right sample or a named cause; none crashes, hangs or vanishes."""

from __future__ import annotations

import os
import random
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import open_clip
from sat_train.data.sources.read import read_source
from sat_train.errors import DataError
from tests.unit.data.test_dataset import make
from tests.unit.data.videos import SIDE, numbers_of, record_of, write_numbered

CAUSES = {"unreadable", "no video", "truncated", "damaged", "short", "too small", "too large", "no times"}


def outcome(path, *, index=0):
    """Returns `right`, `wrong` or the cause for which the clip is refused."""
    dataset = make([record_of(path)], max_num_frames=9, timeout_s=120, max_upscale=1)
    try:
        sample = dataset.sample(index, dataset.order.clip_ref(0))
    except BadClip as error:
        return error.cause
    numbers = [round(time * 30) for time in sample.times]
    return "right" if numbers_of(sample.video_tchw) == numbers else "wrong"


@pytest.fixture(scope="module", params=["a.mp4", "front.mp4", "a.mkv", "a.avi", "a.ts"])
def intact(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / request.param
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    write_numbered(path, num_frames=60, rate=30, codec=codec, index_first=path.name == "front.mp4")
    return path


def test_files_cut_at_every_tenth_are_never_read_wrongly(intact, tmp_path):
    data = intact.read_bytes()
    result = []
    for tenth in range(10):
        cut = tmp_path / f"{tenth}{intact.suffix}"
        cut.write_bytes(data[: len(data) * tenth // 10])
        result.append(outcome(cut, index=tenth))
    assert set(result) <= CAUSES | {"right"}
    assert result[0] == "unreadable"
    if intact.suffix == ".mp4":
        assert "right" not in result  # the index tells that something is missing, wherever the window lies


def test_flipped_bits_never_crash(intact, tmp_path):
    rng = random.Random(str(intact.name))
    data = intact.read_bytes()
    result = Counter()
    for trial in range(14):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 10, 100))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{trial}{intact.suffix}"
        path.write_bytes(flipped)
        result[outcome(path, index=trial)] += 1
    assert set(result) <= CAUSES | {"right", "wrong"}  # some flips leave a valid file with another picture


def test_odd_files_are_refused_by_name(tmp_path):
    write_numbered(tmp_path / "one.mp4", num_frames=1)
    write_numbered(tmp_path / "tiny.mp4", num_frames=60, side=16)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    (tmp_path / "folder.mp4").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert {path.stem: outcome(path) for path in sorted(tmp_path.iterdir())} == {
        "empty": "unreadable",
        "folder": "unreadable",
        "one": "short",
        "picture": "short",
        "sound": "no video",
        "text": "unreadable",
        "tiny": "too small",
        "zeros": "unreadable",
    }
    assert outcome(tmp_path / "nothing.mp4") == "missing"


def test_a_list_of_files_is_no_clip(tmp_path):
    """Else a text file would be shown as the film that it points at."""
    write_numbered(tmp_path / "a.mp4", num_frames=60, rate=30)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\nfile a.mp4\n")
    assert outcome(tmp_path / "list.mp4") == "unreadable"


@pytest.mark.timeout(300)
def test_what_is_not_a_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    (tmp_path / "folder.mp4").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(BadClip, match="unreadable: it is not a file"), open_clip(path):
            raise AssertionError(path)


def test_a_video_with_another_suffix_is_read(tmp_path):
    write_numbered(tmp_path / "a.mp4", num_frames=60, rate=30)
    (tmp_path / "a.mp4").rename(tmp_path / "a.avi")
    assert outcome(tmp_path / "a.avi") == "right"


def test_metadata_in_another_encoding_does_not_matter(tmp_path):
    path = tmp_path / "a.mp4"
    write_numbered(path, num_frames=60, rate=30)
    data = path.read_bytes()
    assert data.count(b"VideoHandler") == 1
    path.write_bytes(data.replace(b"VideoHandler", b"Vid\xe4oHandler"))
    assert outcome(path) == "right"


def test_8k_is_read_and_more_is_refused(tmp_path):
    for name, width, height in (("8k.jpg", 7680, 4320), ("16k.jpg", 15360, 8640)):
        Image.new("L", (width, height), 200).save(tmp_path / name, quality=10)
    big = make([record_of(tmp_path / "8k.jpg")], max_num_frames=1)[0].sample
    assert big.video_tchw.shape == (1, 3, SIDE, SIDE)
    assert abs(int(big.video_tchw.float().mean()) - 200) <= 1
    with pytest.raises(DataError, match="too large: pictures of 15360x8640 pixels"):
        make([record_of(tmp_path / "16k.jpg")], max_num_frames=1)[0]


def test_the_counts_add_up(tmp_path):
    """Good clips, bad clips and other files of a folder are all accounted for."""
    for i in range(6):
        write_numbered(tmp_path / "videos" / f"{i}.mp4", num_frames=60, rate=30)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{i}.txt").write_text("x")
    for i in (1, 4):
        path = tmp_path / "videos" / f"{i}.mp4"
        path.write_bytes(path.read_bytes()[:-700])
    (tmp_path / "videos" / "notes.md").write_text("x")
    source = read_source(tmp_path)
    dataset = make(source.records)
    results = [dataset[i] for i in range(6)]
    bad = {failure.clip_id for result in results for failure in result.failures}
    good = {result.sample.clip_id for result in results}
    assert bad == {"videos/1.mp4", "videos/4.mp4"}
    assert good | bad == {record.clip_id for record in source.records}
    assert source.ignored == ((".md", 1),)
