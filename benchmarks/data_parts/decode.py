"""Measures the cost of a sample of a video file, compared with other readers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from sat_train.data.clips.clip_file import open_clip
from sat_train.data.clips.frames import FrameReader
from sat_train.data.clips.resize import cover_crop

FPS, NUM_FRAMES, SIZE, RATE = 8, 49, (480, 720), 30
SPAN = int(NUM_FRAMES / FPS * RATE)  # source frames that CogVideo reads for a sample
CLIP_S, LONG = 12, 10
BIT_RATES = {720: 4_000_000, 1080: 8_000_000}
# Frames as uint8 THWC and their numbers in the file; `None` where the way makes none.
Found = tuple[np.ndarray | None, Sequence[int]]


def draw_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws a picture `[height, width, 3]` whose spectrum falls as that of photographs does."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    fall = 1 / np.maximum(np.hypot(y, x), 1 / width)
    planes = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * fall).real for _ in range(2)]
    grey, tint = (plane / plane.std() for plane in planes)
    return 128 + 45 * grey[..., None] + 12 * tint[..., None] * np.array([1, 0.2, -1])


def write_natural(path: Path, height: int, width: int, *, gop: int, preset: str) -> None:
    """Writes a textured object before a textured ground, both moving, with grain, at a usual bit rate.

    x264's defaults hold otherwise: 3 B-frames that others may refer to.
    """
    rng = np.random.default_rng(0)
    ground, thing = (draw_texture(rng, height, width).astype(np.int16) for _ in range(2))
    grain = rng.normal(0, 3, (height, width, 1)).astype(np.int16)
    rows, columns = np.ogrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": preset})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size, stream.bit_rate = gop, BIT_RATES[height]
        for i in range(CLIP_S * RATE):
            x = round(width * (0.5 + 0.3 * np.sin(i / 40)))
            inside = np.hypot(rows - height // 2, columns - x)[..., None] < height // 4
            picture = np.where(inside, np.roll(thing, x, 1), np.roll(ground, (i // 3, -2 * i), (0, 1)))
            picture = picture + np.roll(grain, rng.integers(0, width, 2), (0, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat(path: Path, source: Path, times: int) -> None:
    """Writes a clip several times behind itself, without encoding it again."""
    with av.open(str(path), "w") as container:
        stream = None
        for turn in range(times):
            with av.open(str(source)) as clip:
                stream = stream or container.add_stream_from_template(clip.streams.video[0])
                shift = round(turn * CLIP_S / clip.streams.video[0].time_base)
                for packet in clip.demux(video=0):
                    if packet.dts is not None:
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
                        container.mux(packet)


def ours(path: Path, first: int) -> Found:
    """Seeks, decodes what is needed, scales and converts only the frames that are used."""

    def choose_crop(height: int, width: int):
        return cover_crop(source=(height, width), target=SIZE, max_upscale=4)

    with open_clip(path) as (container, stream):
        reader = FrameReader(container, stream)
        read = reader.read(
            [reader.info.first + first / RATE + i / FPS for i in range(NUM_FRAMES)], choose_crop
        )
    return read.video_thwc, [round(moment * RATE) for moment in read.times]


def their_numbers(first: int) -> list[int]:
    """Returns the frames that CogVideo takes: `load_video` in sat/data_video.py, zai-org/CogVideo@7a1af71."""
    return np.arange(first, first + SPAN, SPAN / NUM_FRAMES).astype(int).tolist()


def scale(frames: torch.Tensor) -> np.ndarray:
    """Scales and cuts frames `[t, h, w, 3]` as CogVideo does."""
    video = frames.permute(0, 3, 1, 2)
    cover = [SIZE[0], int(video.shape[3] * SIZE[0] / video.shape[2])]
    video = center_crop(resize(video, cover, interpolation=InterpolationMode.BICUBIC), list(SIZE))
    return video.permute(0, 2, 3, 1).numpy()


def take(frames: torch.Tensor, first: int) -> Found:
    """Takes a sample's frames from a whole span as CogVideo does."""
    numbers = their_numbers(first)
    return scale(frames[torch.tensor(numbers) - first]), numbers


def whole_span(path: Path, first: int) -> Found:
    """Seeks, decodes the span, converts all of it to RGB, scales what is used: CogVideo's way with PyAV."""
    frames = np.stack([frame.to_ndarray(format="rgb24") for frame in _decode(path, first)])
    return take(torch.from_numpy(frames), first)


def floor(path: Path, first: int) -> Found:
    """Seeks and decodes the span, and nothing else."""
    for _ in _decode(path, first):
        pass
    return None, ()


def needed(path: Path, first: int) -> Found:
    """Seeks and decodes what the frames of a sample refer to, and nothing else: the physical limit."""
    wanted = {round(first + i * RATE / FPS) for i in range(NUM_FRAMES)}
    for _ in _decode(path, first, wanted):
        pass
    return None, ()


def _decode(path: Path, first: int, wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
    """Decodes the frames of a span; with `wanted`, leaves out frames that nothing refers to."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        start = float(stream.start_time * stream.time_base)
        container.seek(int((start + first / RATE) / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            if packet.pts is not None and wanted is not None:
                is_wanted = round((packet.pts * packet.time_base - start) * RATE) in wanted
                context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            for frame in packet.decode():
                number = round((frame.time - start) * RATE)
                if number >= first + SPAN:
                    return
                if number >= first:
                    yield frame


def decord_span(path: Path, first: int) -> Found:
    """CogVideo's way: decord reads the whole span as RGB."""
    import decord

    decord.bridge.set_bridge("torch")
    reader = decord.VideoReader(uri=str(path), height=-1, width=-1, num_threads=1)
    return take(reader.get_batch(np.arange(first, first + SPAN)), first)


def decord_used(path: Path, first: int) -> Found:
    """The best of decord, which CogVideo leaves unused: only the frames that are taken become RGB."""
    import decord

    decord.bridge.set_bridge("torch")
    reader = decord.VideoReader(uri=str(path), height=-1, width=-1, num_threads=1)
    numbers = their_numbers(first)
    return scale(reader.get_batch(numbers)), numbers


def decord_open(path: Path, first: int) -> Found:
    """Opens the file with decord, which indexes all of it."""
    import decord

    decord.VideoReader(uri=str(path), height=-1, width=-1, num_threads=1)
    return None, ()


def ways() -> dict[str, Callable[[Path, int], Found]]:
    """Returns all ways; those with decord where it is installed."""
    found = {"ours": ours, "span": whole_span, "floor": floor, "needed": needed}
    try:
        import decord  # noqa: F401
    except ImportError:
        return found
    return {**found, "decord": decord_span, "decord_used": decord_used, "decord_open": decord_open}


def check_same(path: Path, first: int) -> str:
    """Compares the frames that the ways return, and says how they differ."""
    mine, my_numbers = ours(path, first)
    differences = []
    for way in sorted(ways().keys() & {"span", "decord", "decord_used"}):
        theirs, numbers = ways()[way](path, first)
        apart = [abs(a - b) for a, b in zip(my_numbers, numbers, strict=True)]
        same = [i for i, number in enumerate(apart) if number == 0]
        error = np.abs(mine[same].astype(np.int16) - theirs[same]).mean()
        assert max(apart) <= 2, f"{way} takes other frames: {numbers} instead of {my_numbers}"
        assert error < 3, f"{way} gives other pictures: {error:.2f} levels apart on average"
        differences.append(f"{way} {error:.2f}")
    return (
        f"of {NUM_FRAMES} frames they take {len(same)} as ours, the others at most {max(apart)} earlier; "
        f"the same frames differ by {', '.join(differences)} levels on average"
    )


def compare(path: Path, name: str, samples: int) -> None:
    """Times all ways in turn on random windows and prints one row of the table, and the ratios."""
    with open_clip(path) as (container, stream):
        last = round(FrameReader(container, stream).info.duration * RATE) - SPAN - RATE // FPS
    firsts = np.random.default_rng(1).integers(0, last, samples).tolist()
    summary = check_same(path, firsts[0])
    costs: dict[str, list[float]] = {way: [] for way in ways()}
    for first in firsts:
        for way, read in ways().items():
            began = time.process_time()
            read(path, first)
            costs[way].append(1e3 * (time.process_time() - began))
    print(f"\n{name}, {path.stat().st_size / 1e6:.1f} MB, {samples} windows; {summary}")
    for way, cost in costs.items():
        row = f"  {way:<12}{statistics.median(cost):8.0f} ms of CPU"
        ratios = [theirs / mine for theirs, mine in zip(cost, costs["ours"], strict=True)]
        print(f"{row}   /ours: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}", flush=True)


def run(samples: int, heights: Sequence[int], preset: str, clip: Path | None = None) -> None:
    """Compares readers on synthetic clips, or on one clip of 30 frames a second."""
    if clip is not None:
        compare(clip.absolute(), clip.name, samples)
        return
    with tempfile.TemporaryDirectory() as folder:
        for height in heights:
            for gop in (30, 250):
                path = Path(folder, f"{height}_{gop}.mp4")
                write_natural(path, height, height * 16 // 9, gop=gop, preset=preset)
                compare(path, f"{height}p, {CLIP_S} s, keyframe every {gop}", samples)
        long = Path(folder, "long.mp4")
        repeat(long, path, LONG)
        compare(long, f"{height}p, {LONG * CLIP_S} s, keyframe every {gop}", samples)
