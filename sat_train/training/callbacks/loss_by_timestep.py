"""The training loss in equal parts of the noise schedule."""

from __future__ import annotations

from dataclasses import replace

import torch

from sat_train.config.parts.callback_parts import LossByTimestepParams
from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.objective.training_inputs import LossOutput
from sat_train.training.loop.callback import Callback, CallbackContext, Training


class LossByTimestep(Callback):
    """Adds to the metrics the mean loss in each part of the schedule since the last report.

    Losses stay on the device until a step is reported. A part without a sample is left out.

    Args:
        mesh: The process mesh.
        num_timesteps: Steps of the schedule.
        parts: Number of parts.
    """

    def __init__(self, mesh: ProcessMesh, *, num_timesteps: int, parts: int) -> None:
        self._mesh, self._num_timesteps, self._parts = mesh, num_timesteps, parts
        self._pending: list[LossOutput] = []

    def loss_computed(self, output: LossOutput, batch: LoadedBatch) -> None:
        """Keeps the losses of a micro-batch, without its graph."""
        self._pending.append(replace(output, loss=output.loss.detach()))

    def measure(self, trainer: Training) -> dict[str, float]:
        """Returns the means by the first timestep of each part: `loss_t0`, `loss_t100`.

        Ranks: all.
        """
        sums = sum_over_data(self._mesh, self._sums().to(self._mesh.device)).tolist()
        firsts = [-(-part * self._num_timesteps // self._parts) for part in range(self._parts)]
        return {
            f"loss_t{first}": loss / count for first, (loss, count) in zip(firsts, sums, strict=True) if count
        }

    def _sums(self) -> torch.Tensor:
        """Returns loss and count of each part on this rank, float64 of shape (parts, 2), and forgets them."""
        sums = torch.zeros(self._parts, 2, dtype=torch.float64)
        if self._pending:
            loss_b = torch.cat([output.loss_b for output in self._pending]).cpu().double()
            timesteps_b = torch.cat([output.timesteps_b for output in self._pending])
            rows = torch.stack([loss_b, torch.ones_like(loss_b)], dim=1)
            sums.index_add_(0, timesteps_b * self._parts // self._num_timesteps, rows)
        self._pending.clear()
        return sums


def build(params: LossByTimestepParams, context: CallbackContext) -> LossByTimestep:
    """Builds the callback of a run."""
    num_timesteps = context.config.spec.schedule.num_timesteps
    return LossByTimestep(context.mesh, num_timesteps=num_timesteps, parts=params.parts)
