"""Meter of losses, times and memory between two log lines, without waiting for the device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.loop.metrics import TrainMetrics
from sat_train.training.loop.state import TrainState
from sat_train.training.loop.step import StepResult

_GIB = 2**30


class Meter:
    """Collects the results of steps and averages them for a report.

    Args:
        mesh: The process mesh.
        peak_tflops: Peak of this rank's card; None: unknown.
    """

    def __init__(self, mesh: ProcessMesh, *, peak_tflops: float | None = None) -> None:
        self._mesh, self._peak_tflops = mesh, peak_tflops
        self._pending: list[torch.Tensor] = []
        self._last_loss = float("nan")
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self._steps = 0
        self._samples = 0
        self._data_wait_s = 0.0
        self._flops = 0.0
        self._since = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Adds one step."""
        self._pending.append(result.loss)
        self._steps += 1
        self._samples += result.num_samples
        self._data_wait_s += result.data_wait_s
        self._flops += result.model_flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes its body from the step time: saving, validating."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def fold_losses(self, state: TrainState) -> None:
        """Averages the pending losses over the ranks and adds them to the smoothed loss, in their order.

        Ranks: all.
        """
        if not self._pending:
            return
        losses = sum_over_data(self._mesh, torch.stack(self._pending)) / self._mesh.data_size
        self._pending.clear()
        for loss in losses.tolist():
            state.take_loss(loss)
            self._last_loss = loss

    def read(
        self,
        state: TrainState,
        *,
        lr: float,
        grad_norm: float,
        measured: Mapping[str, float] | None = None,
    ) -> TrainMetrics:
        """Returns the metrics of the step that has just ended, averaged since the last call.

        Call `fold_losses` before.
        """
        seconds = time.perf_counter() - self._since
        steps, tflops = max(1, self._steps), self._flops / seconds / 1e12
        return TrainMetrics(
            step=state.step,
            loss=self._last_loss,
            loss_smoothed=state.loss_smoothed,
            lr=lr,
            grad_norm=grad_norm,
            step_time_s=seconds / steps,
            data_wait_s=self._data_wait_s / steps,
            samples_per_s=self._samples / seconds,
            peak_memory_gib=peak_memory_gib(self._mesh.device),
            skipped=state.skipped,
            tflops=tflops,
            mfu=tflops / self._peak_tflops if self._peak_tflops else None,
            measured=measured or {},
        )


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this process in GiB: of the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
