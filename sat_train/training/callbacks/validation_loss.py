"""The validation loss: fixed clips, noise and timesteps, nothing dropped; it depends on the weights only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from sat_train.data.batch import LoadedBatch
from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.loop.metrics import ValidationMetrics

NUM_TIMESTEPS = 8


def validation_timesteps(num_timesteps: int, count: int = NUM_TIMESTEPS) -> tuple[int, ...]:
    """Returns the middles of `count` equal parts of the schedule."""
    return tuple(int((part + 0.5) * num_timesteps / count) for part in range(count))


@torch.no_grad()
def validation_loss(
    *,
    step: int,
    batches: Iterable[LoadedBatch],
    losses_of: Callable[[LoadedBatch, torch.Tensor], torch.Tensor],
    num_samples: int,
    timesteps: Sequence[int],
    mesh: ProcessMesh,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> ValidationMetrics | None:
    """Measures the loss over the validation clips; sample `i` is noised to timestep `i mod len(timesteps)`.

    Args:
        step: Optimizer steps done.
        batches: This rank's batches; each rank has as many.
        losses_of: (batch, timesteps_b on the CPU) -> loss of each sample, [b].
        num_samples: Clips in all. Later indices, which fill the last batches, do not count.
        timesteps: The timesteps.
        mesh: The process mesh.
        asked_to_stop: Called before each batch, on all ranks.

    Returns:
        The metrics; None when interrupted.

    Ranks: all.
    """
    sums = torch.zeros(len(timesteps), 2, dtype=torch.float64)  # loss and count of each timestep
    for batch in batches:
        if asked_to_stop():
            return None
        slots = torch.tensor([index % len(timesteps) for index in batch.sample_indices])
        losses = losses_of(batch, torch.tensor(timesteps)[slots]).double().cpu()
        counts = torch.tensor([index < num_samples for index in batch.sample_indices])
        for slot, loss, counted in zip(slots.tolist(), losses, counts, strict=True):
            if counted:
                sums[slot] += torch.stack([loss, torch.ones_like(loss)])
    sums = sum_over_data(mesh, sums.to(mesh.device)).cpu()
    seen = sums[:, 1] > 0
    by_timestep = {
        timestep: float(total / count)
        for timestep, (total, count) in zip(timesteps, sums, strict=True)
        if count
    }
    assert bool(seen.any()), "no clip was validated"
    return ValidationMetrics(
        step=step,
        valid_loss=float(sums[:, 0].sum() / sums[:, 1].sum()),
        valid_loss_by_timestep=by_timestep,
        valid_samples=int(sums[:, 1].sum()),
    )
