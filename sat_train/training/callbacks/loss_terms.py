"""The terms of the training loss, each by itself in the metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.objective.training_inputs import LossOutput
from sat_train.training.loop.callback import Callback, Training

TERM = "loss/"  # in front of the name of a term among the metrics


class LossTerms(Callback):
    """Adds to the metrics each term of a step's loss, without its weight: `loss/diffusion`, `loss/NAME`.

    As the loss itself they are means over the global batch, and stay on the device until a step is reported.

    Args:
        mesh: The process mesh.
        names: The terms.
        micro_steps: Micro-batches of a step.
    """

    def __init__(self, mesh: ProcessMesh, *, names: Sequence[str], micro_steps: int) -> None:
        self._mesh, self._names = mesh, tuple(names)
        self._step: deque[torch.Tensor] = deque(maxlen=micro_steps)

    def loss_computed(self, output: LossOutput, batch: LoadedBatch) -> None:
        """Keeps the means of a micro-batch."""
        self._step.append(torch.stack([output.terms[name].mean() for name in self._names]))

    def measure(self, trainer: Training) -> dict[str, float]:
        """Returns the terms of this step. Ranks: all."""
        own = torch.stack(list(self._step)).mean(0)
        means = (sum_over_data(self._mesh, own) / self._mesh.data_size).tolist()
        return {f"{TERM}{name}": mean for name, mean in zip(self._names, means, strict=True)}
