"""The memory of the loader's own worker process over many samples."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np

from sat_train.config.shapes import ClipShape
from sat_train.data.batches import OrderedBatches
from sat_train.data.buckets import SampleSpec, one_bucket
from sat_train.data.dataset import VideoDataset
from sat_train.data.failure_log import FailureLog
from sat_train.data.loader import VideoLoader
from sat_train.data.sampler import GlobalOrder
from sat_train.data.sources.read import read_source

SHAPE = ClipShape(17, 64, 96)
DEMO = Path(__file__).resolve().parents[2] / "sat_train" / "assets" / "demo" / "train"


def demo_loader() -> VideoLoader:
    """Returns a loader of the shipped clips with one worker."""
    source = read_source(DEMO)
    order = GlobalOrder(seed=0, clip_weights=[[1.0] * len(source)])
    dataset = VideoDataset(
        sources=[source],
        order=order,
        buckets=one_bucket(SHAPE, [source]),
        spec=SampleSpec((SHAPE,), fps=8),
        seed=0,
        timeout_s=60,
    )
    failures = FailureLog(num_clips=len(source), max_bad_fraction=0.0)
    return VideoLoader(dataset=dataset, batches=OrderedBatches([1]), failures=failures, num_workers=1)


def resident_kib(pid: int) -> int:
    """Returns the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") // 1024


def run(samples: int) -> None:
    """Prints the memory of both processes ten times, and how it grows after the first tenth."""
    loader = demo_loader()
    rows = []
    for count in range(1, samples + 1):
        next(loader)
        if count % (samples // 10):
            continue
        (worker,) = multiprocessing.active_children()
        rows.append((count, resident_kib(worker.pid), resident_kib(os.getpid())))
        print(
            f"{count:>7} samples   worker {rows[-1][1] / 1024:.1f} MiB   main {rows[-1][2] / 1024:.1f} MiB",
            flush=True,
        )
    loader.close()
    counts, worker_kib, main_kib = np.array(rows, float).T
    for name, kib in (("worker", worker_kib), ("main", main_kib)):
        slope = 1000 * np.polyfit(counts, kib, 1)[0]
        print(f"{name}: {slope:+.1f} KiB for each 1000 samples after the first {samples // 10}", flush=True)
