"""Numbers of held-out clips: fixed clips, noise and timesteps, so that they depend on the weights only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sat_train.distributed.collectives import gather_objects, gather_pixels
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.metrics import Picture

T = TypeVar("T")
_Rows = dict[int, list[float]]  # by index of the sample


@dataclass(frozen=True)
class ClipNumbers:
    """Numbers of the clips of a batch.

    Args:
        timesteps: The timesteps.
        values: [b, timesteps].
        counts: For each clip, whether it has these numbers; None: all have.
    """

    timesteps: tuple[int, ...]
    values: Tensor
    counts: Sequence[bool] | None = None


@dataclass(frozen=True)
class Measured:
    """Numbers of a batch.

    Args:
        clip_ids: Its clips.
        sample_indices: Global indices of its samples.
        tables: Numbers, by a name that is the same for all batches.
        pictures: Frames of some of its clips.
    """

    clip_ids: tuple[str, ...]
    sample_indices: tuple[int, ...]
    tables: Mapping[str, ClipNumbers]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """Numbers of all clips, on all ranks alike.

    Args:
        tables: By name, without those that no clip has.
        pictures: On rank 0; in the order of the clips; of one clip in the order in which they were made.
    """

    tables: Mapping[str, ClipLosses]
    pictures: tuple[Picture, ...]


def validation_timesteps(num_timesteps: int, count: int) -> tuple[int, ...]:
    """Returns the middles of `count` equal parts of the schedule."""
    return tuple(int((part + 0.5) * num_timesteps / count) for part in range(count))


@torch.no_grad()
def measure_clips(
    *,
    batches: Iterable[T],
    measure: Callable[[T], Measured],
    num_samples: int,
    mesh: ProcessMesh,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Measurements | None:
    """Measures the validation clips.

    Args:
        batches: This rank's batches; each rank has as many.
        measure: Measures a batch.
        num_samples: Clips in all. Later indices, which fill the last batches, do not count.
        mesh: The process mesh.
        asked_to_stop: Called before each batch, on all ranks.

    Returns:
        Numbers and pictures in the order of the samples; None when interrupted.

    Ranks: all.
    """
    clips: dict[int, str] = {}
    tables: dict[str, _Rows] = {}
    timesteps: dict[str, tuple[int, ...]] = {}
    pictures: list[Picture] = []
    for batch in batches:
        if asked_to_stop():
            return None
        measured = measure(batch)
        indices = measured.sample_indices
        pictures += measured.pictures
        clips.update(zip(indices, measured.clip_ids, strict=True))
        for name, table in measured.tables.items():
            timesteps[name] = table.timesteps
            rows = zip(indices, table.values.double().cpu().tolist(), strict=True)
            counts = table.counts or [True] * len(indices)
            kept = {index: row for (index, row), has in zip(rows, counts, strict=True) if has}
            tables.setdefault(name, {}).update(kept)
    shares = gather_objects(mesh, (clips, tables, timesteps))
    names = _clip_names({at: clip for share in shares for at, clip in share[0].items() if at < num_samples})
    columns = {name: each for share in shares for name, each in share[2].items()}
    return Measurements(
        _together(names, [share[1] for share in shares], columns),
        _gather_pictures(mesh, pictures if mesh.model_rank == 0 else []),
    )


def _gather_pictures(mesh: ProcessMesh, pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """Returns the pictures of all ranks on rank 0, and none on the others."""
    words = [(each.view, each.sample_index, each.caption) for each in pictures]
    pixels = gather_pixels(mesh, {place: each.frames_tchw for place, each in enumerate(pictures)})
    pairs = zip(gather_objects(mesh, words), pixels, strict=False)
    gathered = [
        Picture(*word, frames)
        for words, share in pairs
        for word, frames in zip(words, share.values(), strict=True)
    ]
    return tuple(sorted(gathered, key=lambda each: each.sample_index))


def _together(
    names: Mapping[int, str], shares: Sequence[dict[str, _Rows]], timesteps: Mapping[str, tuple[int, ...]]
) -> dict[str, ClipLosses]:
    """Joins the tables of all ranks."""
    joined = {}
    for table, columns in timesteps.items():
        rows = {index: row for share in shares for index, row in share.get(table, {}).items()}
        clips = {names[index]: tuple(rows[index]) for index in sorted(names.keys() & rows.keys())}
        if clips:
            joined[table] = ClipLosses(columns, clips)
    return joined


def _clip_names(clips: Mapping[int, str]) -> dict[int, str]:
    """Names samples by their clips; a clip that replaces a bad one comes twice and gets its number too."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for index in sorted(clips):
        clip = clips[index]
        names[index] = clip if clip not in taken else f"{clip} in place of {index}"
        taken.add(names[index])
    return names
