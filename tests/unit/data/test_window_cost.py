"""Work is that of the window, not of the file, also in containers without a time for each frame."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.frames import open_frames
from sat_train.data.clips.resize import cover_crop
from tests.unit.data.videos import SIDE, draw_number, read_number, write_numbered

FILES = Path(__file__).parent / "files"
RATE, LARGE = 25, 256
CASES = [("a.avi", "mpeg4", {"bf": "2"}), ("b.avi", "mjpeg", {}), ("a.mpg", "mpeg2video", {"bf": "2"})]


def choose_crop(height, width):
    return cover_crop(source=(height, width), target=(SIDE, SIDE), max_upscale=4)


def read(path, start, count=5, fps=8):
    """Returns the numbers of a window's frames, their times, and those that were asked for."""
    with open_frames(path) as reader:
        targets = [reader.info.first + start + i / fps for i in range(count)]
        frames = reader.read(targets, choose_crop)
    numbers = [read_number(picture) for picture in frames.video_thwc]
    return numbers, frames.times, [start + i / fps for i in range(count)]


def write_heavy(path, codec, options, num_frames):
    """Writes numbered frames with so much noise in them that the file is large."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (8, LARGE, LARGE, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"qmin": "2", "qmax": "4", **options})
        stream.width = stream.height = LARGE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.bit_rate = 12, 20_000_000
        for i in range(num_frames):
            picture = draw_number(i, LARGE, LARGE) // 8 * 7 + noise[i % 8] // 8
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def bytes_read() -> int:
    """Returns how many bytes this process has read through the system so far, FFmpeg's among them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.parametrize(("name", "codec", "options"), CASES)
def test_a_late_window_reads_a_small_part_of_the_file(tmp_path, name, codec, options):
    path = tmp_path / name
    num_frames = 900 if name == "a.mpg" else 300
    write_heavy(path, codec, options, num_frames)
    size = os.path.getsize(path)
    assert size > 4_000_000
    for start in (0.5, num_frames / RATE / 2, num_frames / RATE - 1.5):
        before = bytes_read()
        numbers, _, targets = read(path, start)
        assert max(abs(n / RATE - t) for n, t in zip(numbers, targets, strict=True)) <= 0.5 / RATE + 1e-6
        assert bytes_read() - before < size / 2, start  # probing reads 2 MB of an MPEG-PS


@pytest.mark.parametrize(("name", "codec", "options"), CASES)
def test_windows_anywhere_show_the_frames_that_reading_from_the_beginning_shows(
    tmp_path, name, codec, options
):
    """Small frames, of which many lie between two time stamps of a program stream."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    rng = random.Random(name)
    for gop, num, side in ((5, 60, SIDE), (12, 200, 160), (40, 150, SIDE)):
        how = {"codec": codec, "options": options, "pix_fmt": pix_fmt, "gop": gop, "side": side}
        write_numbered(tmp_path / name, num_frames=num, rate=RATE, **how)
        in_order = times_in_order(tmp_path / name)
        for _ in range(12):
            start = rng.uniform(0, (num - 1) / RATE - 0.5)
            numbers, times, targets = read(tmp_path / name, start)
            assert times == pytest.approx([in_order[n] for n in numbers], abs=1e-4)
            nearest = [min(abs(time - t) for time in in_order.values()) for t in targets]
            distances = [abs(time - t) for time, t in zip(times, targets, strict=True)]
            assert distances == pytest.approx(nearest, abs=1e-4)


def times_in_order(path):
    """Returns when each frame is shown, by its number, as FFmpeg tells it who reads the file in order."""
    with av.open(str(path)) as container:
        frames = [(f.pts, read_number(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)]
        tick = float(container.streams.video[0].time_base)
    return {number: (pts - frames[0][0]) * tick for pts, number in frames}


def test_packed_b_frames_are_all_found():
    """Two frames in one packet, as DivX and Xvid wrote them: windows show what decoding in order shows."""
    path = FILES / "xvid_packed.avi"
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        packets = list(container.demux(video=0))
        pictures = [f.to_ndarray(format="gray") for packet in packets for f in context.decode(packet)]
    assert len(pictures) == 73  # the first is shown for three slots
    for start in range(60):
        with open_frames(path) as reader:
            targets = [(start + i) / 25 for i in range(0, 13, 3)]
            frames = reader.read(targets, whole)
        grey = frames.video_thwc[0].astype(int).mean(axis=2)
        likeness = [np.abs(picture.astype(int) - grey).mean() for picture in pictures]
        assert int(np.argmin(likeness)) == max(0, start - 2)
        assert frames.times[1:] == pytest.approx(targets[1:], abs=0.5 / 25)


def whole(height, width):
    return cover_crop(source=(height, width), target=(height, width), max_upscale=1)


def test_reordered_h264_in_avi_is_refused_whichever_window_is_wanted(tmp_path):
    write_numbered(tmp_path / "a.avi", num_frames=50, rate=25)
    for start in (0.0, 0.5, 1.2):
        with pytest.raises(BadClip, match="no times: AVI does not store the order"):
            read(tmp_path / "a.avi", start)


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_a_recording_that_begins_between_keyframes_begins_at_its_first_keyframe(tmp_path, name):
    codec = "libx264" if name == "a.ts" else "mpeg2video"
    write_heavy_enough = {"side": 128, "num_frames": 100, "rate": 25, "gop": 20}
    write_numbered(tmp_path / name, codec=codec, options={"bf": "0"}, **write_heavy_enough)
    data = (tmp_path / name).read_bytes()
    block = 188 if name == "a.ts" else 2048
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(data[len(data) // 3 // block * block :])
    with open_frames(cut) as reader:
        info = reader.info
        frames = reader.read([info.first + i / 8 for i in range(5)], choose_crop)
    numbers = [read_number(picture) for picture in frames.video_thwc]
    assert numbers[0] % 20 == 0
    assert frames.times[0] == 0
    assert numbers == [numbers[0] + round(t * 25) for t in frames.times]
