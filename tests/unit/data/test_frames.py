"""Frames by presentation time, checked against videos whose frames carry their own number."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import open_clip
from sat_train.data.clips.frames import FrameReader
from sat_train.data.clips.resize import cover_crop
from tests.unit.data.videos import SIDE, read_number, write_numbered

RATES = [6, 7, 8, 10, 12, 15, Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 48, 50]
RATES += [Fraction(60000, 1001), 60]


def read(path, targets, size=(SIDE, SIDE), **options):
    def choose_crop(height, width):
        return cover_crop(source=(height, width), target=size, max_upscale=100)

    with open_clip(path) as (container, stream):
        reader = FrameReader(container, stream, **options)
        return reader.info, reader.read([reader.info.first + t for t in targets], choose_crop)


def nearest_errors(moments, targets, times):
    """How much farther each chosen frame is from its moment than the nearest frame of the file."""
    best = [min(abs(s - t) for s in moments) for t in targets]
    return [abs(chosen - t) - b for chosen, t, b in zip(times, targets, best, strict=True)]


@pytest.mark.parametrize("rate", RATES, ids=lambda r: f"{float(r):.3f}")
def test_frames_are_the_nearest_to_their_moments_at_any_rate(tmp_path, rate):
    moments = write_numbered(tmp_path / "a.mp4", num_frames=int(3 * rate), rate=rate)
    for start in (0.0, 0.31, 1.07):
        targets = [start + i / 8 for i in range(13)]
        info, frames = read(tmp_path / "a.mp4", targets)
        numbers = [read_number(picture) for picture in frames.video_thwc]
        assert info.rate == pytest.approx(float(rate), rel=1e-6)
        assert [moments[n] for n in numbers] == pytest.approx(frames.times, abs=1e-4)
        assert max(abs(a - b) for a, b in zip(frames.times, targets, strict=True)) <= 0.5 / rate + 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_frames_are_the_nearest_at_a_variable_rate(tmp_path, seed):
    rng = random.Random(seed)
    times = [Fraction(0)]
    while times[-1] < 4:
        times.append(times[-1] + Fraction(rng.choice((750, 1500, 3000, 4500, 9000, 27000)), 90000))
    moments = write_numbered(tmp_path / "a.mp4", times=times)
    targets = [0.4 + i / 8 for i in range(25)]
    _, frames = read(tmp_path / "a.mp4", targets)
    assert [moments[read_number(p)] for p in frames.video_thwc] == pytest.approx(frames.times, abs=1e-4)
    assert max(nearest_errors(moments, targets, frames.times)) < 1e-4


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """SVT-AV1, run as root, makes its caller a real-time process, and so all that this one starts."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, parameters)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "x264-params": "b-pyramid=normal:keyint=250:scenecut=0"}),
        ("a.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=10"}),
        ("a.mp4", "libx265", {"x265-params": "log-level=none:bframes=3:open-gop=1:keyint=10:pools=1"}),
        ("a.mov", "mpeg4", {}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "row-mt": "0"}),
        ("a.ts", "libx264", {}),
        ("a.avi", "mjpeg", {}),
        ("a.avi", "mpeg4", {"bf": "2"}),
        ("a.mpg", "mpeg2video", {"bf": "2"}),
        ("a.wmv", "wmv2", {}),
        ("a.gif", "gif", {}),
        ("a.mp4", "libsvtav1", {"preset": "12"}),
        ("a.mov", "prores_ks", {}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.flv", "libx264", {}),
        ("a.mkv", "ffv1", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_frame_is_found_by_its_own_time_in_any_container(tmp_path, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
    path = tmp_path / name
    muxing = {key: value for key, value in options.items() if key == "movflags"}
    how = {"codec": codec, "options": options, "pix_fmt": pix_fmt, "container_options": muxing}
    with ordinary_priority():
        write_numbered(path, num_frames=50, rate=25, gop=10, side=64, **how)  # 64: the least that AV1 takes
    for first in (0, 1, 9, 10, 11, 23, 44):
        wanted = [first, first + 2, first + 5]
        _, frames = read(path, [n / 25 for n in wanted], size=(64, 64))
        assert [read_number(picture) for picture in frames.video_thwc] == wanted


def test_a_file_whose_times_are_not_those_of_its_frames_is_refused(tmp_path):
    """AVI has no presentation times, so H.264 in it comes out of order."""
    write_numbered(tmp_path / "a.avi", num_frames=50, rate=25)
    for moment in (0.2, 1.0):
        with pytest.raises(BadClip, match=r"no times|cannot be decoded"):
            read(tmp_path / "a.avi", [moment, moment + 0.5])


def test_headers_tell_the_length_in_any_container(tmp_path):
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")):
        write_numbered(tmp_path / name, num_frames=50, rate=25, codec=codec)
        info, _ = read(tmp_path / name, [0.0])
        assert info.last - info.first == pytest.approx(49 / 25, abs=0.011), name
        assert info.duration == pytest.approx(2.0, abs=0.011), name


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts", "a.flv", "a.wmv", "a.gif"])
@pytest.mark.parametrize("pauses", [(0,), (45,), (80,), (1, 86), (0, 30, 89)])
def test_headers_tell_when_the_last_frame_is_shown_at_a_variable_rate(tmp_path, name, pauses):
    """Frames out of order: an mp4 file's length leaves out pauses among those that are held back."""
    gaps = [0, *(Fraction(20 if i in pauses else 1, 25) for i in range(90))]
    how = {".gif": {"codec": "gif", "pix_fmt": "rgb8"}, ".wmv": {"codec": "wmv2"}}.get(Path(name).suffix)
    how = how or {"options": {"bf": "3", "b_strategy": "0"}}
    moments = write_numbered(tmp_path / name, times=list(itertools.accumulate(gaps)), **how)
    info, _ = read(tmp_path / name, [0.0])
    assert info.last - info.first == pytest.approx(moments[-1], abs=1e-3)


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    """Of a 20 s clip a window of 1 s at the end: no more than its keyframe interval and itself."""
    options = {"bf": "3", "x264-params": "keyint=30:scenecut=0:b-adapt=0"}
    write_numbered(tmp_path / "a.mp4", num_frames=600, rate=30, gop=30, options=options)
    decoded = []
    whole = FrameReader._whole

    def count(self, frames):
        decoded.extend(frames)
        return whole(self, frames)

    monkeypatch.setattr(FrameReader, "_whole", count)
    _, frames = read(tmp_path / "a.mp4", [18.5 + i / 8 for i in range(8)])
    assert [read_number(picture) for picture in frames.video_thwc] == [555, 559, 562, 566, 570, 574, 577, 581]
    assert len(decoded) < 30  # 42 lie between the keyframe and the window's end; others refer to half of them


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "yuv422p", "gray", "yuvj420p"])
def test_pixel_formats_give_the_same_picture(tmp_path, pix_fmt):
    codec = "ffv1" if pix_fmt == "gray" else "libx264"
    write_numbered(tmp_path / "a.mkv", num_frames=20, rate=10, codec=codec, pix_fmt=pix_fmt)
    _, frames = read(tmp_path / "a.mkv", [0.5, 1.5])
    assert [read_number(picture) for picture in frames.video_thwc] == [5, 15]
    assert frames.video_thwc.dtype == np.uint8
    assert frames.video_thwc.shape == (2, SIDE, SIDE, 3)
    light = frames.video_thwc[0][frames.video_thwc[0] > 128]
    assert abs(light.mean() - 228) < 6  # the range (full or limited) is read as it was written


MATRICES = {5: (0.299, 0.114), 1: (0.2126, 0.0722)}  # AVCOL_SPC_BT470BG (601), AVCOL_SPC_BT709: K_r, K_b


@pytest.mark.parametrize("space", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (20, 20), (48, 48)])
def test_colours_are_those_of_the_file_s_matrix_and_range(tmp_path, space, full_range, size):
    """Against the formulas of ITU-R BT.601 and BT.709, not against FFmpeg."""
    color = np.array([200.0, 80.0, 40.0]) / 255
    kr, kb = MATRICES[space]
    luma = kr * color[0] + (1 - kr - kb) * color[1] + kb * color[2]
    chroma = np.array([(color[2] - luma) / (2 - 2 * kb), (color[0] - luma) / (2 - 2 * kr)])
    offset, scale = (0, (255, 255)) if full_range else (16, (219, 224))
    yuv = [offset + scale[0] * luma, *(128 + scale[1] * chroma)]
    planes = np.broadcast_to(np.round(yuv)[:, None, None], (3, SIDE, SIDE)).astype(np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full_range else 1
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")
        frame.colorspace, frame.color_range = space, 2 if full_range else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, frames = read(tmp_path / "a.mkv", [0.0], size=size)
    assert np.abs(frames.video_thwc[0].astype(int) - (200, 80, 40)).max() <= 2


def test_a_transparent_picture_lies_over_black(tmp_path):
    picture = np.zeros((40, 60, 4), np.uint8)
    picture[:, :30] = (200, 100, 50, 255)
    picture[:, 30:] = (200, 100, 50, 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    info, frames = read(tmp_path / "a.png", [0.0], size=(40, 60))
    assert info.is_image
    assert info.first == info.last
    assert np.abs(frames.video_thwc[0, :, :25].astype(int) - (200, 100, 50)).max() <= 2
    assert frames.video_thwc[0, :, 35:].max() == 0


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_metadata_is_obeyed(tmp_path, rotation):
    """A player turns the stored picture counterclockwise by the matrix's angle, and so does the reader."""
    write_numbered(tmp_path / "a.mp4", num_frames=10, rate=10, rotation=rotation)
    write_numbered(tmp_path / "upright.mp4", num_frames=10, rate=10)
    _, turned = read(tmp_path / "a.mp4", [0.6])
    _, upright = read(tmp_path / "upright.mp4", [0.6])
    expected = np.rot90(upright.video_thwc[0], rotation // 90)
    assert np.abs(turned.video_thwc[0].astype(int) - expected).max() <= 1


def test_pictures_are_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 97, 51, "yuv444p"  # odd on purpose
        picture = np.zeros((51, 97, 3), np.uint8)
        picture[:, :, 0] = np.arange(97) * 2
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    _, frames = read(tmp_path / "a.mkv", [0.0], size=(51, 51))
    columns = frames.video_thwc[0, 25, :, 0].astype(int)
    assert np.abs(columns - np.arange(23, 74) * 2).max() <= 4


def test_a_window_past_the_end_is_refused(tmp_path):
    write_numbered(tmp_path / "a.mp4", num_frames=30, rate=30)
    with pytest.raises(BadClip, match=r"truncated: its last frame ends at 1\.00 s"):
        read(tmp_path / "a.mp4", [0.5, 1.5])


def test_a_clip_that_takes_too_long_is_given_up(tmp_path):
    write_numbered(tmp_path / "a.mp4", num_frames=30, rate=30)
    with pytest.raises(BadClip, match="timeout"):
        read(tmp_path / "a.mp4", [0.5], deadline=0.0)
