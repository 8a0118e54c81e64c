"""Prints what reading costs: work per sample against reading the whole span, and the memory of a long run.

    python benchmarks/data.py decode
    python benchmarks/data.py decode --clip my_clip.mp4
    python benchmarks/data.py memory --samples 10000

`decode` draws grainy clips (720p and 1080p, H.264, 30 frames a second, a keyframe every 1 or 8.3 seconds),
takes 49 frames at 8 a second from random places, and compares, in one process and one thread:

    ours    seek, decode what is needed, scale and convert only the frames that are used
    span    seek, decode all of the span, convert all of it to RGB, scale what is used (CogVideo's way)
    decord  the same with decord, where it is installed
    floor   seek and decode all of the span, and nothing else
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from make_demo_videos import draw_clip

from sat_train.data.clip_file import open_clip
from sat_train.data.dataset import VideoDataset
from sat_train.data.frames import FrameReader
from sat_train.data.resize import plan_cover_crop
from sat_train.data.sampler import GlobalOrder
from sat_train.data.sources import read_source

FPS, NUM_FRAMES, SIZE = 8, 49, (480, 720)


def write_grainy(path: Path, height: int, width: int, *, seconds: int = 12, gop: int) -> None:
    """Writes a drawn scene with film grain, so that its bits are spent as in real footage."""
    rng = np.random.default_rng(0)
    frames, _, _ = draw_clip(1004, height=height, width=width, fps=30, num_frames=20)
    grain = [rng.normal(0, 5, frames.shape[1:]).astype(np.int16) for _ in range(4)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = gop
        for i in range(seconds * 30):
            turn = i % 38
            picture = frames[turn if turn < 20 else 38 - turn] + grain[i % 4]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ours(path: Path, start: float) -> None:
    def plan(height: int, width: int):
        return plan_cover_crop(source=(height, width), target=SIZE, max_upscale=4)

    with open_clip(path) as (container, stream):
        FrameReader(container, stream).read([start + i / FPS for i in range(NUM_FRAMES)], plan)


def scale_as_upstream(frames: np.ndarray) -> None:
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resize(video, list(SIZE), interpolation=InterpolationMode.BICUBIC)


def whole_span(path: Path, start: float) -> None:
    scale_as_upstream(np.stack(list(_span(path, start, convert=True)))[:: 30 // FPS][:NUM_FRAMES])


def floor(path: Path, start: float) -> None:
    for _ in _span(path, start, convert=False):
        pass


def _span(path: Path, start: float, *, convert: bool):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time > start + NUM_FRAMES / FPS:
                return
            if frame.time >= start:
                yield frame.to_ndarray(format="rgb24") if convert else frame


def decord_span(path: Path, start: float) -> None:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    first = int(start * 30)
    frames = reader.get_batch(range(first, first + NUM_FRAMES * 30 // FPS)).asnumpy()
    scale_as_upstream(frames[:: 30 // FPS][:NUM_FRAMES])


def ways() -> dict[str, Callable[[Path, float], None]]:
    found = {"ours": ours, "span": whole_span, "floor": floor}
    try:
        import decord  # noqa: F401
    except ImportError:
        return found
    return {**found, "decord": decord_span}


def compare(path: Path, name: str, samples: int) -> None:
    with open_clip(path) as (container, stream):
        last = FrameReader(container, stream).info.last
    starts = np.random.default_rng(1).uniform(0, last - NUM_FRAMES / FPS, samples)
    costs = {}
    for way, read in ways().items():
        began = time.process_time()
        for start in starts:
            read(path, float(start))
        costs[way] = (time.process_time() - began) / samples
    told = "  ".join(f"{way} {1e3 * cost:7.0f} ms" for way, cost in costs.items())
    print(f"{name:<28} {told}   span/ours {costs['span'] / costs['ours']:.2f}", flush=True)


def decode(options: argparse.Namespace) -> None:
    if options.clip:
        compare(options.clip.absolute(), options.clip.name, options.samples)
        return
    with tempfile.TemporaryDirectory() as folder:
        for height, width in ((720, 1280), (1080, 1920)):
            for gop in (30, 250):
                path = Path(folder, f"{height}_{gop}.mp4")
                write_grainy(path, height, width, gop=gop)
                size = path.stat().st_size * 8 / 12 / 1e6
                compare(path, f"{height}p, keyframe/{gop}, {size:.1f} Mb/s", options.samples)


def memory(options: argparse.Namespace) -> None:
    """Reads samples of the shipped clips in this process, as a worker does."""
    root = Path(__file__).resolve().parents[1] / "sat_train" / "assets" / "demo" / "train"
    source = read_source(root)
    order = GlobalOrder(seed=0, clip_weights=[[1.0] * len(source)])
    dataset = VideoDataset(
        sources=[source], order=order, video_size=(64, 96), fps=8, max_num_frames=17, seed=0, timeout_s=60
    )
    for index in range(options.samples + 1):
        dataset[index]
        if index % max(1, options.samples // 10) == 0:
            print(f"{index:>7} samples  {resident_mib():.1f} MiB", flush=True)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("decode", "memory"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--clip", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"decode": decode, "memory": memory}[options.what](options)


if __name__ == "__main__":
    main()
