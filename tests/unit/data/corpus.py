"""A folder of damaged and odd files, drawn by the tests, with what is to become of each."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.unit.data.videos import SIDE, draw_number, write_numbered

GOOD = "good"
ANY = "any"  # it may be read or refused: what some flips leave is a valid file with another picture

VP9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime", "row-mt": "0"}}
CONTAINERS = {
    "last.mp4": {},
    "first.mp4": {"index_first": True},
    "fragments.mp4": {"container_options": {"movflags": "+frag_keyframe+empty_moov"}},
    "a.mov": {},
    "a.mkv": {},
    "a.webm": VP9,
    "a.avi": {"codec": "mpeg4", "options": {"bf": "0"}},
    "a.ts": {},
}
NUM_FRAMES, RATE = 40, 30

Labels = dict[str, str]  # a file's path below `videos/`, and GOOD, ANY, or the causes it may be refused for


def make_corpus(root: Path) -> Labels:
    """Fills `root/videos` and `root/labels`; returns what is to become of each clip."""
    videos = root / "videos"
    labels: Labels = {}
    for make in (
        _containers,
        _good,
        _not_videos,
        _odd_files,
        _without_index,
        _odd_pictures,
        _odd_times,
        _large,
    ):
        made = make(videos)
        assert not made.keys() & labels.keys(), made.keys() & labels.keys()
        labels.update(made)
    for name in labels:
        write_caption(root, name)
    (videos / "folder.mp4").mkdir()  # not a clip, as little as the next
    (videos / "notes.md").write_text("not a clip")
    return labels


def write_caption(root: Path, name: str) -> None:
    label = (root / "labels" / name).with_suffix(".txt")
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_text(f"clip {name}", encoding="utf-8")


def make_pipe(root: Path) -> Path:
    """Makes a set of one clip that nothing will ever write to: opening it waits for ever."""
    (root / "videos").mkdir(parents=True)
    os.mkfifo(root / "videos" / "pipe.mp4")
    write_caption(root, "pipe.mp4")
    return root / "videos" / "pipe.mp4"


def _containers(videos: Path) -> Labels:
    """Each kind of container: whole, cut at every tenth, and with flipped bits."""
    labels = {}
    for kind, how in CONTAINERS.items():
        whole, stem, suffix = videos / "whole" / kind, Path(kind).stem, Path(kind).suffix
        write_numbered(whole, num_frames=NUM_FRAMES, rate=RATE, **how)
        labels[f"whole/{kind}"] = GOOD
        data = whole.read_bytes()
        for tenth in range(10):
            name = f"cut/{stem}-{suffix[1:]}-{tenth}{suffix}"
            _write(videos / name, data[: len(data) * tenth // 10])
            labels[name] = ANY if tenth else "unreadable"
        rng = random.Random(kind)
        for flips in (1, 10, 100):
            flipped = bytearray(data)
            for _ in range(flips):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            name = f"flipped/{stem}-{suffix[1:]}-{flips}{suffix}"
            _write(videos / name, bytes(flipped))
            labels[name] = ANY
    return labels


def _good(videos: Path) -> Labels:
    for i in range(30):
        write_numbered(videos / "good" / f"{i:02d}.mp4", num_frames=NUM_FRAMES, rate=RATE, gop=5 + i)
    return {f"good/{i:02d}.mp4": GOOD for i in range(30)}


def _not_videos(videos: Path) -> Labels:
    """Files that are something else."""
    _write(videos / "empty.mp4", b"")
    _write(videos / "text.mp4", b"not a video\n" * 100)
    _write(videos / "zeros.mkv", bytes(5000))
    _write(videos / "noise.ts", random.Random(0).randbytes(5000))
    _write(videos / "page.mp4", b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    _write(videos / "playlist.mp4", b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n")
    _write(videos / "list.mp4", b"ffconcat version 1.0\nfile good/00.mp4\n")
    Image.new("RGB", (SIDE, SIDE)).save(videos / "picture.png")
    os.rename(videos / "picture.png", videos / "picture.mp4")
    (videos / "dangling.mp4").symlink_to(videos / "nowhere.mp4")
    _write_sound(videos / "sound.mp4", cover=False)
    _write_sound(videos / "cover.mp4", cover=True)
    labels = dict.fromkeys(("empty.mp4", "text.mp4", "zeros.mkv", "page.mp4", "playlist.mp4"), "unreadable")
    labels |= {"noise.ts": "unreadable", "list.mp4": "unreadable", "picture.mp4": "short"}
    labels |= {"dangling.mp4": "missing", "sound.mp4": "no video", "cover.mp4": "no video"}
    if os.geteuid():  # root may read everything
        write_numbered(videos / "locked.mp4", num_frames=NUM_FRAMES)
        (videos / "locked.mp4").chmod(0)
        labels["locked.mp4"] = "unreadable"
    return labels


def _odd_files(videos: Path) -> Labels:
    """Files whose names, lengths or sizes are not what a set wants."""
    mp4, mkv = (videos / "whole" / kind for kind in ("last.mp4", "a.mkv"))
    _write(videos / "mp4.avi", mp4.read_bytes())
    _write(videos / "mkv.mp4", mkv.read_bytes())
    _write(videos / "UPPER.MP4", mp4.read_bytes())
    _write(videos / "tail.mp4", mp4.read_bytes() + b"and more" * 1000)
    (videos / "link.mp4").symlink_to(mp4)
    write_numbered(videos / "one.mp4", num_frames=1)
    write_numbered(videos / "three.mkv", num_frames=3)
    write_numbered(videos / "tiny.mp4", num_frames=NUM_FRAMES, side=16)
    labels = dict.fromkeys(("mp4.avi", "mkv.mp4", "UPPER.MP4", "tail.mp4", "link.mp4"), GOOD)
    return {**labels, "one.mp4": "short", "three.mkv": "short", "tiny.mp4": "too small"}


def _without_index(videos: Path) -> Labels:
    """Files without what tells where their frames are."""
    whole = videos / "whole"
    _write(videos / "no_moov.mp4", (whole / "last.mp4").read_bytes().replace(b"moov", b"junk"))
    _write(videos / "no_idx1.avi", (whole / "a.avi").read_bytes().replace(b"idx1", b"JUNK"))
    _write(videos / "no_mdat.mp4", (whole / "first.mp4").read_bytes().partition(b"mdat")[0][:-4])
    write_numbered(videos / "no_cues.mkv", num_frames=NUM_FRAMES, rate=RATE, container_options={"live": "1"})
    labels = {"no_moov.mp4": "unreadable", "no_idx1.avi": GOOD, "no_mdat.mp4": "truncated"}
    for name in ("no_frames.mp4", "no_frames.mkv"):
        with av.open(str(videos / name), "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width = stream.height = SIDE
            stream.pix_fmt = "yuv420p"
            container.start_encoding()
    labels |= dict.fromkeys(("no_frames.mp4", "no_frames.mkv"), "unreadable, no times, no video, truncated")
    return {**labels, "no_cues.mkv": GOOD}


def _odd_pictures(videos: Path) -> Labels:
    """Pixel formats, shapes and rotations."""
    how = {"num_frames": NUM_FRAMES, "rate": RATE}
    for pix_fmt in ("yuv444p", "yuv420p10le", "yuv422p10le", "yuvj420p", "gray"):
        write_numbered(videos / f"{pix_fmt}.mp4", pix_fmt=pix_fmt, **how)
    for angle in (90, 180, 270):
        write_numbered(videos / f"turned{angle}.mp4", rotation=angle, **how)
    write_numbered(videos / "alpha.webm", pix_fmt="yuva420p", **VP9, **how)
    write_numbered(videos / "palette.gif", codec="gif", pix_fmt="rgb8", num_frames=NUM_FRAMES, rate=25)
    write_numbered(videos / "alpha.mov", codec="png", pix_fmt="rgba", **how)
    for codec, pix_fmt in (("libx264", "yuv444p"), ("ffv1", "yuv420p")):
        with av.open(str(videos / f"odd_{codec}.mkv"), "w") as container:
            stream = container.add_stream(codec, rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 97, 51, pix_fmt
            for i in range(NUM_FRAMES):
                picture = np.full((51, 97, 3), i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    names = [
        path.name for path in videos.iterdir() if path.name.startswith(("yuv", "gray", "turned", "odd_"))
    ]
    return dict.fromkeys((*names, "alpha.webm", "alpha.mov", "palette.gif"), GOOD)


def _odd_times(videos: Path) -> Labels:
    """Clocks that start over, stand still, jump, or are missing."""
    ts = (videos / "whole" / "a.ts").read_bytes()
    _write(videos / "twice.ts", ts + ts)
    _write_packets(videos / "still.mkv", lambda i: i // 2 * 2)
    _write_packets(videos / "jump.mkv", lambda i: i if i < 20 else i + 300_000)
    _write_packets(videos / "far.mkv", lambda i: i + 10_000_000)
    write_numbered(videos / "raw.h264.mp4", num_frames=NUM_FRAMES, rate=RATE)
    with av.open(str(videos / "raw.mpg"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for i in range(NUM_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_number(i), format="rgb24")))
        container.mux(stream.encode())
    labels = {"twice.ts": ANY, "still.mkv": ANY, "jump.mkv": ANY, "far.mkv": GOOD}
    return {**labels, "raw.h264.mp4": GOOD, "raw.mpg": "no times"}


def _large(videos: Path) -> Labels:
    """Very large pictures, and headers that claim such."""
    with av.open(str(videos / "8k.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 7680, 4320, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((4320 * 3 // 2, 7680), 128, np.uint8), format="yuv420p")
        for i in range(5):
            picture.pts = i
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    for name, width, height in (("8k.jpg", 7680, 4320), ("16k.jpg", 15360, 8640), ("small.jpg", 64, 64)):
        Image.new("L", (width, height), 200).save(videos / name, quality=10)
    jpeg = bytearray((videos / "small.jpg").read_bytes())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65500, 65500)
    _write(videos / "claim.jpg", bytes(jpeg))
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    _write(videos / "claim.png", b"\x89PNG\r\n\x1a\n" + chunk)
    mp4 = bytearray((videos / "whole" / "last.mp4").read_bytes())
    struct.pack_into(">HH", mp4, mp4.index(b"avc1", mp4.index(b"stsd")) + 28, 65535, 65535)
    _write(videos / "claim.mp4", bytes(mp4))
    labels = {"8k.mp4": GOOD, "8k.jpg": "short", "small.jpg": "short", "16k.jpg": "too large"}
    claims = dict.fromkeys(("claim.jpg", "claim.png"), "too large, unreadable")
    return {**labels, **claims, "claim.mp4": GOOD}  # the stream knows better


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_sound(path: Path, *, cover: bool) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = SIDE, SIDE, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(draw_number(3), format="rgb24")))
            container.mux(art.encode())
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_packets(path: Path, time_of: Callable[[int], int]) -> None:
    """Writes pictures whose packets carry any times, in 1/30 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p"
        for i in range(NUM_FRAMES):
            for packet in stream.encode(av.VideoFrame.from_ndarray(draw_number(i), format="rgb24")):
                packet.time_base = Fraction(1, RATE)
                packet.pts = packet.dts = time_of(i)
                container.mux(packet)
