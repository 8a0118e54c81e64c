"""Checks the space in /dev/shm, through which data workers hand over batches: 64 MB in a plain container."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sat_train.config.shapes import ClipShape
from sat_train.log import get_logger

log = get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")
REMEDY = (
    "start the container with --shm-size=16g or --ipc=host, "
    "or lower args.num_workers, args.prefetch_factor or args.batch_size"
)


def bytes_in_flight(
    shapes: Sequence[ClipShape],
    batch_sizes: Sequence[int],
    *,
    num_workers: int,
    prefetch_factor: int,
    planes_of: Callable[[int], int] = lambda frames: 0,
) -> int:
    """Returns the largest total size of the batches that one rank's workers hold.

    Args:
        shapes: Shapes of the samples.
        batch_sizes: Samples in a batch of each shape.
        num_workers: Workers of the rank.
        prefetch_factor: Batches that each of them prepares.
        planes_of: Returns the bytes a pixel of the fields of a sample of this many frames.
    """
    pixels = [(3 * shape.frames + planes_of(shape.frames)) * shape.height * shape.width for shape in shapes]
    largest = max(size * count for size, count in zip(pixels, batch_sizes, strict=True))
    return largest * (num_workers * prefetch_factor + 1) if num_workers else 0


def warn_of_little_shared_memory(needed: int, *, local_ranks: int) -> None:
    """Warns if the ranks of this machine need more shared memory than there is, before a worker dies of it.

    Args:
        needed: Bytes that one rank needs.
        local_ranks: Ranks on this machine.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return
    if free < needed * local_ranks:
        log.warning(
            "%s has %s free, but the data workers of %d ranks may hold %s of batches in it and then die "
            "of a bus error; %s",
            *(SHARED_MEMORY, _size(free), local_ranks, _size(needed * local_ranks), REMEDY),
        )


def describe_free() -> str:
    """Returns the free space, for a message."""
    try:
        return f"{SHARED_MEMORY} has {_size(shutil.disk_usage(SHARED_MEMORY).free)} free"
    except OSError:
        return f"there is no {SHARED_MEMORY}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
