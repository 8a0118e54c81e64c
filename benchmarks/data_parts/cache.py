"""Measures the cost of a batch of cached encodings in the reading process and in the training process."""

from __future__ import annotations

import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from sat_train.config.shapes import ClipShape
from sat_train.data.batches import OrderedBatches
from sat_train.data.buckets import SampleSpec, one_bucket
from sat_train.data.dataset import VideoDataset
from sat_train.data.failure_log import FailureLog
from sat_train.data.loader import VideoLoader
from sat_train.data.sampler import GlobalOrder
from sat_train.data.sources.records import ClipRecord, ClipSource
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import CacheIndex, OpenCache
from sat_train.encoding.cache.key import EncoderDigests
from sat_train.encoding.cache.shards import ShardWriter
from sat_train.encoding.conditions.image import ImageCondition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.encoding.encoded_dataset import EncodedDataset

MOMENTS, IMAGE, TEXT = (13, 16, 60, 90), (1, 16, 60, 90), (226, 4096)  # of CogVideoX-5B
CLIPS, WARM = 24, 20
ENCODERS = EncoderDigests(vae="vae", text="text encoder")


def write_plain(path: Path) -> None:
    """Writes a clip of 12 seconds; only its headers are read."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width = stream.height = 64
        for i in range(360):
            picture = np.full((64, 64, 3), i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def open_dataset(folder: Path, image: bool) -> EncodedDataset:
    """Returns a set whose clips begin at different moments of one file."""
    path = (folder / "clip.mp4").absolute()
    records = [ClipRecord(f"{i}", path, (f"caption {i}",), start=i * 0.2) for i in range(CLIPS)]
    cache = OpenCache(folder, CacheIndex(folder), FileMetadata(folder), ENCODERS, "require")
    shape = ClipShape(49, 480, 720)
    sources = [ClipSource("benchmark", tuple(records), "")]
    videos = VideoDataset(
        sources=sources,
        order=GlobalOrder(seed=0, clip_weights=[[1.0] * CLIPS]),
        buckets=one_bucket(shape, sources),
        spec=SampleSpec((shape,), fps=8, window="head", max_upscale=16.0),
        seed=0,
        views=1,
    )
    text = TextCondition(null="zero", empty_prompt=lambda: torch.zeros(TEXT))
    return EncodedDataset(videos, cache, [text, *([ImageCondition(scale=1.0)] if image else [])])


def fill(folder: Path, dataset: EncodedDataset, dtype: torch.dtype) -> None:
    """Writes encodings of all samples of one epoch."""
    writer = ShardWriter(folder)
    for index in range(CLIPS):
        entries = dataset.entries(index, dataset.videos.order.clip_ref(index))

        def draw(*shape: int, seed: int = index) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

        shapes = {"clip": MOMENTS, "image": IMAGE}
        for name, entry in entries.items():
            tensors = {"text": draw(*TEXT)}
            if name in shapes:
                tensors = {"mean": draw(*shapes[name]), "logvar": draw(*shapes[name])}
            writer.add(entry.key, tensors, entry.info)
    writer.publish()


def open_loader(dataset: EncodedDataset, batch_size: int, workers: int) -> VideoLoader:
    return VideoLoader(
        dataset=dataset.videos,
        reader=dataset,
        batches=OrderedBatches([batch_size]),
        failures=FailureLog(num_clips=CLIPS, max_bad_fraction=0.0),
        num_workers=workers,
    )


def measure(loader: VideoLoader, batches: int, step_s: float) -> dict[str, np.ndarray]:
    """Takes batches as a training loop of steps of `step_s` does; returns milliseconds a batch."""
    rows, batch = [], None
    for _ in range(WARM + batches):
        began = time.process_time()
        batch = None
        freed, asked = time.process_time(), time.monotonic()
        batch = next(loader)
        got, waited_s = time.process_time(), time.monotonic() - asked
        assert isinstance(batch, EncodedBatch)
        rows.append((waited_s, got - freed, freed - began))
        if step_s:
            time.sleep(step_s)
    loader.close()
    return dict(zip(("wait", "cpu", "free"), 1e3 * np.array(rows[WARM:]).T, strict=True))


def run(batches: int, step_s: float = 0.05) -> None:
    """Prints the cost of reading in one process, and the time that a training step waits for workers."""
    print(f"{batches} batches each, milliseconds a batch: p10 / median / p90; steps of {1e3 * step_s:.0f} ms")
    heads = f"{'here':>22}" + "".join(f"{f'wait, {n} worker':>24}{'CPU':>22}{'to free':>8}" for n in (1, 2))
    print(" " * 26 + heads)
    for dtype in (torch.bfloat16, torch.float32):
        for image in (False, True):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_plain(folder / "clip.mp4")
                time.sleep(2.1)  # a file that has just been changed is hashed each time
                fill(folder, open_dataset(folder, image), dtype)
                for batch_size in (1, 2):
                    _row(open_dataset(folder, image), dtype, batch_size, batches, step_s)


def _row(dataset: EncodedDataset, dtype: torch.dtype, batch_size: int, batches: int, step_s: float) -> None:
    task = "T2V" if len(dataset.conditions) == 1 else "I2V"
    alone = measure(open_loader(dataset, batch_size, 0), batches, 0)
    cells = [f"{_format(alone['wait']):>22}"]
    for workers in (1, 2):
        loaded = measure(open_loader(dataset, batch_size, workers), batches, step_s)
        cells.append(
            f"{_format(loaded['wait']):>24}{_format(loaded['cpu']):>22}{np.median(loaded['free']):>8.2f}"
        )
    print(f"{task}, {str(dtype)[6:]}, batch {batch_size}".ljust(26) + "".join(cells), flush=True)


def _format(values: np.ndarray) -> str:
    return " / ".join(f"{np.percentile(values, share):.2f}" for share in (10, 50, 90))
