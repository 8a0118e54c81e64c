"""A batch of held-out clips with one of its conditions replaced: another clip's, none, or moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sat_train.encoding.conditions.condition import Condition, Encoding
from sat_train.encoding.conditions.randomness import SampleRandomness
from sat_train.encoding.encoded_batch import CLIP, EncodedBatch
from sat_train.training.loop.condition_losses import DROPPED, SHUFFLED

_TIME, _ROWS, _COLUMNS = 1, -2, -1  # axes of an encoding [b, t, ..., h, w]


@dataclass(frozen=True)
class Move:
    """A move of a condition against its clip, by one place of the latent's grid.

    Args:
        axis: Axis of the encoding.
        by: Places towards larger indices.
    """

    axis: int
    by: int


MOVES: Mapping[str, Move] = {
    "a latent frame later": Move(_TIME, 1),
    "a latent frame earlier": Move(_TIME, -1),
    "a latent pixel down": Move(_ROWS, 1),
    "a latent pixel up": Move(_ROWS, -1),
    "a latent pixel to the right": Move(_COLUMNS, 1),
    "a latent pixel to the left": Move(_COLUMNS, -1),
}


@dataclass(frozen=True)
class Variant:
    """A batch with one condition replaced.

    Args:
        name: What has replaced it: `shuffled`, `dropped` or a move.
        batch: The batch.
        timesteps: Timesteps at which its loss is measured.
    """

    name: str
    batch: EncodedBatch
    timesteps: tuple[int, ...]


def gives_inputs(condition: Condition, batch: EncodedBatch, latent_shape: Sequence[int]) -> bool:
    """Returns whether a condition gives the network anything: a teacher's features are for the loss alone.

    Args:
        condition: The condition.
        batch: A batch, on the device.
        latent_shape: Of the noised latent, (b, t, c, h, w).
    """
    random = SampleRandomness(0, batch.sample_indices)
    return bool(condition.inputs(batch.encodings[condition.name], random, latent_shape).tensors())


def variants(
    batch: EncodedBatch, condition: Condition, others: Encoding, *, timesteps: Sequence[int], moves: bool
) -> Iterator[Variant]:
    """Yields a batch with a condition of other clips, without it, and with it moved.

    The variants of batches of one shape are the same, so that all ranks make the same forward passes.

    Args:
        batch: The batch.
        condition: The condition.
        others: Its encodings of other clips, one for each.
        timesteps: Timesteps of the validation.
        moves: Whether to move it, too: at the noisiest quarter of the timesteps, where it tells most.
    """
    own = batch.encodings[condition.name]
    every_b = torch.ones(len(batch.sample_indices), dtype=torch.bool)
    device = next(iter(own.values())).device
    yield _with(batch, condition, SHUFFLED, others, timesteps)
    yield _with(batch, condition, DROPPED, condition.drop(own, every_b.to(device)), timesteps)
    if moves:
        latent_shape = batch.encodings[CLIP]["mean"].shape
        for name, move in MOVES.items():
            if (moved := moved_encoding(own, move, latent_shape)) is not None:
                yield _with(batch, condition, name, moved, timesteps[-max(1, len(timesteps) // 4) :])


def _with(
    batch: EncodedBatch, condition: Condition, name: str, encoding: Encoding, timesteps: Sequence[int]
) -> Variant:
    encodings = {**batch.encodings, condition.name: dict(encoding)}
    return Variant(name, replace(batch, encodings=encodings), tuple(timesteps))


def moved_encoding(encoding: Encoding, move: Move, latent_shape: Sequence[int]) -> Encoding | None:
    """Returns an encoding moved against the clip; what leaves is lost, and the edge is repeated.

    Args:
        encoding: Tensors, batch first.
        move: The move.
        latent_shape: Of the clip's latent, (b, t, c, h, w): a tensor whose axes have these sizes lies on its
            grid. A tensor with the clip's own frames in time, `1 + 4 (t - 1)`, moves by four of them.

    Returns:
        None where no tensor lies on the grid along this axis.
    """
    places = {name: _places(tensor, move, latent_shape) for name, tensor in encoding.items()}
    if not any(places.values()):
        return None
    return {name: _moved(tensor, move, places[name]) for name, tensor in encoding.items()}


def _places(tensor: Tensor, move: Move, latent_shape: Sequence[int]) -> int:
    """Returns by how many places of a tensor the move goes; 0 where it does not lie on the grid."""
    _, frames, _, height, width = latent_shape
    if move.axis == _TIME:
        size = tensor.shape[1] if tensor.dim() > 1 else 0
        return {1: 0, frames: move.by, 1 + 4 * (frames - 1): 4 * move.by}.get(size, 0) if frames > 1 else 0
    on_grid = tensor.dim() >= 4 and tuple(tensor.shape[-2:]) == (height, width)
    return move.by if on_grid and tensor.shape[move.axis] > 1 else 0


def _moved(tensor: Tensor, move: Move, by: int) -> Tensor:
    if not by:
        return tensor
    size = tensor.shape[move.axis]
    sources = (torch.arange(size, device=tensor.device) - by).clamp(0, size - 1)
    return tensor.index_select(move.axis, sources)
