"""One optimizer step: micro-steps, agreement of the ranks, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import gather_objects, max_flags
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.signals import StopRequest
from sat_train.engine.engine import TrainEngine
from sat_train.errors import TrainingError


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Args:
        loss: [], fp32, on the device: mean over this rank's samples.
        data_wait_s: Seconds in which this rank waited for the loader.
        stop_level: The highest `StopRequest.level` of all ranks.
        saving: Some rank was writing a checkpoint in the background while this step computed.
        applied: The weights were updated; False when a gradient was not finite.
        grad_norm: Norm of the whole gradient before clipping.
        num_samples: Samples of the step, of all ranks together.
        model_flops: FLOPs of the model on this rank's samples.
    """

    loss: torch.Tensor
    data_wait_s: float
    stop_level: int
    saving: bool
    applied: bool
    grad_norm: float
    num_samples: int
    model_flops: float


class TrainStep:
    """Runs optimizer steps.

    Args:
        engine: The engine around the transformer.
        compute_loss: Mean loss of a batch, through the engine.
        batches: This rank's micro-batches, without end.
        mesh: The process mesh.
        stop_request: Holds whether this process was asked to stop.
        count_flops: FLOPs of the model on a batch, forward and backward.
        is_saving: Returns whether this rank is writing a checkpoint in the background.
        prepare_next: Prepares the next step as far as it can without its batch, while the device computes.
    """

    def __init__(
        self,
        *,
        engine: TrainEngine,
        compute_loss: Callable[[LoadedBatch], torch.Tensor],
        batches: Iterator[LoadedBatch],
        mesh: ProcessMesh,
        stop_request: StopRequest,
        count_flops: Callable[[LoadedBatch], float] = lambda batch: 0.0,
        is_saving: Callable[[], bool] = lambda: False,
        prepare_next: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self._compute_loss = compute_loss
        self._batches = batches
        self._mesh = mesh
        self._stop_request = stop_request
        self._count_flops = count_flops
        self._is_saving, self._prepare_next = is_saving, prepare_next

    def step(
        self, number: int, learning_rate: float, *, before_update: Callable[[], None] = lambda: None
    ) -> StepResult:
        """Runs one step, completely or not at all.

        Args:
            number: Number of this step, from 1, for messages.
            learning_rate: Rate of this step.
            before_update: Called when all gradients are complete, before it is known whether they are finite.

        Raises:
            TrainingError: On all ranks alike, before the update: the loss of some clip is not finite.

        Ranks: all.
        """
        losses: list[torch.Tensor] = []
        seen: list[tuple[str, ...]] = []
        waited, self._flops = 0.0, 0.0
        for _ in range(self.engine.micro_steps - 1):
            waited += self._micro_step(losses, seen)
            self.engine.backward(self._pending)
        waited += self._micro_step(losses, seen)
        flags = self._ask_ranks(losses)  # reduced while the backward pass runs, read with the gradient's norm
        self.engine.backward(self._pending)
        self._prepare_next()  # the device has its work by now
        self.engine.before_update()  # a callback may change weights
        before_update()
        outcome = self.engine.step(learning_rate, flags=flags)
        not_finite, stop_level, saving = outcome.flags
        if not_finite:
            self._raise_not_finite(number, losses, seen)
        return StepResult(
            loss=torch.stack(losses).mean(),
            data_wait_s=waited,
            stop_level=int(stop_level),
            saving=bool(saving),
            applied=outcome.applied,
            grad_norm=outcome.grad_norm,
            num_samples=self._mesh.data_size * sum(len(clips) for clips in seen),
            model_flops=self._flops,
        )

    def stop_level(self) -> int:
        """Returns the highest `StopRequest.level` of all ranks, between two steps.

        Ranks: all.
        """
        flag = torch.tensor([self._stop_request.level], device=self._mesh.device)
        return int(max_flags(self._mesh, flag))

    def _micro_step(self, losses: list[torch.Tensor], seen: list[tuple[str, ...]]) -> float:
        start = time.perf_counter()
        batch = next(self._batches)
        waited = time.perf_counter() - start
        self._pending = self._compute_loss(batch)
        losses.append(self._pending.detach().float())
        seen.append(batch.clip_ids)
        self._flops += self._count_flops(batch)
        return waited

    def _ask_ranks(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Returns for all ranks: some loss is not finite, the highest stop level, some rank is saving."""
        finite = torch.stack(losses).isfinite().all()
        ours = (float(self._stop_request.level), float(self._is_saving()))
        # filled on the device: a copy would wait for the forward pass
        flags = [torch.full((), flag, device=finite.device) for flag in ours]
        return max_flags(self._mesh, torch.stack([(~finite).float(), *flags]))

    def _raise_not_finite(self, number: int, losses: list[torch.Tensor], seen: list[tuple[str, ...]]) -> None:
        ours = [
            f"rank {self._mesh.rank}: loss {float(loss)} on {', '.join(clips)}"
            for loss, clips in zip(losses, seen, strict=True)
            if not math.isfinite(float(loss))
        ]
        lines = [line for lines in gather_objects(self._mesh, ours) for line in lines]
        error = TrainingError(
            "\n  ".join([f"step {number}: the loss is not finite; the weights were not updated", *lines]),
            expected="a finite loss",
            remedy="inspect these clips; lower the learning rate; the last checkpoint is intact",
        )
        error.ranks_agree = True
        raise error
