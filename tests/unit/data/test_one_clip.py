"""Whatever goes wrong with one clip is a bad clip with its name: it ends no run, and opens no other file."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import tarfile
import threading
from fractions import Fraction

import pytest

from sat_train.data.buckets import SampleSpec
from sat_train.data.build import build_train_loader, build_valid_loader
from sat_train.data.clip_pool import look_into_clips
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import open_clip
from sat_train.data.prepass import chunk_records, look_into
from sat_train.data.sources.read import read_source
from sat_train.distributed.processes import start_single_process
from sat_train.errors import DataError
from tests.unit.data.test_build import load_config
from tests.unit.data.test_dataset import make
from tests.unit.data.videos import make_folder, record_of, write_numbered

ERRORS = [KeyError("x"), ZeroDivisionError("division by zero"), RuntimeError("internal"), IndexError(3)]
ERRORS += [MemoryError(), RecursionError("deep"), AssertionError("never"), UnicodeError("bytes")]


@pytest.fixture
def mp4(tmp_path):
    path = tmp_path / "a.mp4"
    write_numbered(path, num_frames=30, rate=30)
    return path


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_while_a_clip_is_read_is_a_bad_clip_with_its_name(mp4, monkeypatch, error):
    write_numbered(mp4.with_name("b.mp4"), num_frames=30, rate=30)
    dataset = make([record_of(mp4), record_of(mp4.with_name("b.mp4"))])
    opened = dataset._read

    def fail(record, *rest):
        if record.clip_id == "a.mp4":
            raise error
        return opened(record, *rest)

    monkeypatch.setattr(dataset, "_read", fail)
    results = [dataset[i] for i in range(4)]
    assert {result.sample.clip_id for result in results} == {"b.mp4"}
    failures = {(f.clip_id, f.cause) for result in results for f in result.failures}
    assert failures == {("a.mp4", "unreadable")}
    assert type(error).__name__ in next(f.detail for result in results for f in result.failures)


def test_any_error_while_headers_are_read_is_a_bad_clip(mp4):
    def look(record):
        raise ERRORS[int(record.clip_id)]

    records = [
        record_of(
            mp4,
        )
        for _ in ERRORS
    ]
    records = [type(r)(str(i), r.path, r.captions) for i, r in enumerate(records)]
    result = look_into_clips(records, look, num_processes=2)
    assert [clip.cause for clip in result] == ["unreadable"] * len(ERRORS)
    assert all(type(error).__name__ in clip.detail for clip, error in zip(result, ERRORS, strict=True))


def test_every_number_of_an_mp4_header_may_be_absurd(mp4):
    """Pixel aspects, clocks, rates, durations, sizes, edit lists, tables: one word of each is replaced."""
    data = mp4.read_bytes()
    words = range(data.index(b"moov") + 4, len(data) - 4, 4)
    for offset, value in zip(words, itertools.cycle((0, 0x7FFFFFFF, 1, 0xFFFFFFFF, 1000)), strict=False):
        odd = bytearray(data)
        struct.pack_into(">I", odd, offset, value)
        mp4.write_bytes(odd)
        record = record_of(mp4)
        with contextlib.suppress(BadClip):
            chunk_records(record, look_into(record, with_turn=True), SampleSpec((), fps=8), 5)
            dataset = make([record], timeout_s=120)
            dataset.sample(0, dataset.order.clip_ref(0))


@pytest.mark.parametrize(("aspect", "cause"), [((1, 1000), "unreadable"), ((2_000_000, 1), "too large")])
def test_pixels_of_an_absurd_shape_are_refused_by_name(mp4, aspect, cause):
    write_numbered(mp4, num_frames=5, aspect=Fraction(3, 2))
    data = bytearray(mp4.read_bytes())
    struct.pack_into(">II", data, data.index(b"pasp") + 4, *aspect)
    mp4.write_bytes(data)
    with pytest.raises(BadClip, match=f"{cause}: pictures of 32x32 pixels of aspect"):
        look_into(record_of(mp4))


def test_all_short_clips_are_named_before_the_first_step(tmp_path):
    folder = make_folder(tmp_path / "set", "abcd", num_frames=30)
    make_folder(folder, ["short", "shorter"], num_frames=12)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    (folder / "labels" / "broken.txt").write_text("x")
    words = ("data.params.short_clip=error", "args.split=1,0,0", f"args.valid_data=[{folder}]")
    config = load_config(*words, train=folder)
    for build in (build_train_loader, build_valid_loader):
        with pytest.raises(DataError, match="2 of 7 clips are too short") as caught:
            build(config, start_single_process())
        assert "set/videos/short.mp4: it gives 4 of 5 frames" in str(caught.value)
        assert "shorter.mp4" in str(caught.value)
        assert "short_clip" in caught.value.remedy


class Watch:
    """A pipe at a path; says whether anybody opened it for reading."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path, self.opened = path, threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self):
        os.close(os.open(self.path, os.O_WRONLY))  # waits for a reader
        self.opened.set()

    def stop(self) -> bool:
        was_opened = self.opened.is_set()
        reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go
        self._thread.join()
        os.close(reader)
        return was_opened


LISTS = {
    "concat": "ffconcat version 1.0\nfile secret.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet><Representation><BaseURL>secret.mp4</BaseURL></Representation>"
    "</AdaptationSet></Period></MPD>\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("place", ["file", "member"])
def test_a_list_inside_a_clip_opens_no_other_file(tmp_path, monkeypatch, kind, place):
    monkeypatch.chdir(tmp_path)
    watch = Watch(tmp_path / "secret.mp4")
    (tmp_path / "list.mp4").write_text(LISTS[kind])
    record = record_of(tmp_path / "list.mp4")
    if place == "member":
        (tmp_path / "list.txt").write_text("x")
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            for name in ("list.mp4", "list.txt"):
                archive.add(tmp_path / name, name)
        record = read_source(tmp_path / "set.tar").clip(0)
    with pytest.raises(BadClip, match="unreadable"), open_clip(record.path, span=record.span):
        raise AssertionError(kind)
    assert not watch.stop()


def test_a_picture_whose_name_looks_like_a_number_of_others_is_itself(tmp_path):
    from PIL import Image

    for name, colour in (("a%02d.png", "red"), ("a00.png", "blue"), ("a01.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    sample = make([record_of(tmp_path / "a%02d.png")], max_num_frames=1)[0].sample
    assert sample.video_tchw[0, :, 5, 5].tolist() == [255, 0, 0]
