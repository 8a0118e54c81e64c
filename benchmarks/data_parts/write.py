"""Measures how long a GPU waits for encodings to be hashed and written, by the caller and by a thread."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from data_parts.cache import IMAGE, MOMENTS
from sat_train.encoding.cache.shards import EntryInfo, ShardWriter
from sat_train.encoding.cache.write_behind import WriteBehind

ROUNDS, SHARD_BYTES = 7, 16_000_000  # so that the last shard, which nothing hides, is a small part


def measure(writer: ShardWriter | WriteBehind, clips: int, device_s: float) -> float:
    """Returns the seconds of a precompute of clips that a device encodes while the host is free."""
    entries = [
        {name: torch.randn(shape).bfloat16() for name in ("mean", "logvar")} for shape in (MOMENTS, IMAGE)
    ]
    began = time.monotonic()
    for number in range(clips):
        time.sleep(device_s)  # the device
        for kind, tensors in enumerate(entries):
            fresh = {name: tensor.clone() for name, tensor in tensors.items()}
            writer.add(f"{number} {kind}", fresh, EntryInfo("clip", f"clip {number}", "vae"))
    writer.publish()
    return time.monotonic() - began


def run(clips: int, device_s: float = 0.2) -> None:
    """Prints milliseconds a clip beyond the device's, in rounds of both ways, one after the other."""
    rows: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            here, behind = (ShardWriter(Path(name) / each, shard_bytes=SHARD_BYTES) for each in "ab")
            writers = (here, WriteBehind(behind))
            first, second = (measure(writer, clips, device_s) / clips - device_s for writer in writers)
            rows.append((1e3 * first, 1e3 * second))
    print(f"{clips} image-to-video clips a round, {1e3 * device_s:.0f} ms of a device each; {ROUNDS} rounds")
    for label, column in zip(("by the caller", "by a thread"), zip(*rows, strict=True), strict=True):
        middle = statistics.median(column)
        print(f"  written {label:<14}{middle:>6.1f} ms a clip ({min(column):.1f} to {max(column):.1f})")
    ratios = [second / first for first, second in rows]
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
