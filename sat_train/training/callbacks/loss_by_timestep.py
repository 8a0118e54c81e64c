"""The training loss in equal parts of the noise schedule."""

from __future__ import annotations

import torch

from sat_train.config.parts.callback_parts import LossByTimestepParams
from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.objective.training_inputs import LossOutput
from sat_train.training.loop.callback import Callback, CallbackContext, Training


class LossByTimestep(Callback):
    """Adds to the metrics the mean loss in each part of the schedule since the last report.

    Sums stay on the device until a step is reported. A part without a sample is left out.

    Args:
        mesh: The process mesh.
        num_timesteps: Steps of the schedule.
        parts: Number of parts.
    """

    def __init__(self, mesh: ProcessMesh, *, num_timesteps: int, parts: int) -> None:
        self._mesh, self._num_timesteps, self._parts = mesh, num_timesteps, parts
        self._sums = torch.zeros(parts, 2, device=mesh.device)  # loss and count

    def loss_computed(self, output: LossOutput, batch: LoadedBatch) -> None:
        """Adds the losses of a micro-batch to their parts."""
        part_b = (output.timesteps_b * self._parts // self._num_timesteps).to(self._sums.device)
        loss_b = output.loss_b.to(self._sums)
        self._sums.index_add_(0, part_b, torch.stack([loss_b, torch.ones_like(loss_b)], dim=1))

    def measure(self, trainer: Training) -> dict[str, float]:
        """Returns the means by the first timestep of each part: `loss_t0`, `loss_t100`.

        Ranks: all.
        """
        sums = sum_over_data(self._mesh, self._sums.clone()).tolist()
        self._sums.zero_()
        firsts = [-(-part * self._num_timesteps // self._parts) for part in range(self._parts)]
        return {
            f"loss_t{first}": loss / count for first, (loss, count) in zip(firsts, sums, strict=True) if count
        }


def build(params: LossByTimestepParams, context: CallbackContext) -> LossByTimestep:
    """Builds the callback of a run."""
    num_timesteps = context.config.spec.schedule.num_timesteps
    return LossByTimestep(context.mesh, num_timesteps=num_timesteps, parts=params.parts)
