"""The validation loss: fixed clips, noise and timesteps, nothing dropped; it depends on the weights only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.loop.clip_losses import ClipLosses

_Row = tuple[str, list[float]]  # clip, and its losses


def validation_timesteps(num_timesteps: int, count: int) -> tuple[int, ...]:
    """Returns the middles of `count` equal parts of the schedule."""
    return tuple(int((part + 0.5) * num_timesteps / count) for part in range(count))


@torch.no_grad()
def measure_clip_losses(
    *,
    batches: Iterable[LoadedBatch],
    losses_of: Callable[[LoadedBatch], torch.Tensor],
    num_samples: int,
    timesteps: tuple[int, ...],
    mesh: ProcessMesh,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> ClipLosses | None:
    """Measures the loss of each validation clip at each timestep.

    Args:
        batches: This rank's batches; each rank has as many.
        losses_of: Returns the losses of a batch, [b, timesteps].
        num_samples: Clips in all. Later indices, which fill the last batches, do not count.
        timesteps: The timesteps.
        mesh: The process mesh.
        asked_to_stop: Called before each batch, on all ranks.

    Returns:
        The losses, in the order of the samples, on all ranks alike; None when interrupted.

    Ranks: all.
    """
    rows: dict[int, _Row] = {}
    for batch in batches:
        if asked_to_stop():
            return None
        losses = losses_of(batch).double().cpu().tolist()
        for index, clip, row in zip(batch.sample_indices, batch.clip_ids, losses, strict=True):
            if index < num_samples:
                rows[index] = (clip, row)
    gathered = {index: row for part in gather_objects(mesh, rows) for index, row in part.items()}
    return ClipLosses(timesteps, _by_clip(gathered))


def _by_clip(rows: dict[int, _Row]) -> dict[str, tuple[float, ...]]:
    """Names the rows by their clips; a clip that replaces a bad one comes twice and gets its number too."""
    clips: dict[str, tuple[float, ...]] = {}
    for index in sorted(rows):
        clip, losses = rows[index]
        clips[clip if clip not in clips else f"{clip} in place of {index}"] = tuple(losses)
    return clips
