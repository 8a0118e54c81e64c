"""The training loop."""

from __future__ import annotations

from collections.abc import Sequence

from sat_train.collector import collect_between_steps, collector_off_in_steps
from sat_train.config.learning_rate import LearningRate
from sat_train.errors import TrainingError
from sat_train.training.loop.callback import Callback, Callbacks
from sat_train.training.loop.meter import Meter
from sat_train.training.loop.metrics import Metrics
from sat_train.training.loop.state import TrainState
from sat_train.training.loop.step import TrainStep

# A dynamic fp16 loss scale settles from 2**16 in fewer steps than this.
_MOST_SKIPS_IN_A_ROW = 40


class Trainer:
    """Trains until the run is complete or was asked to stop, and calls the callbacks.

    Args:
        train_step: Runs the steps.
        meter: Collects their results.
        learning_rate: Rate by step.
        train_iters: Step at which the run is complete.
        log_interval: Steps between reports.
        state: Position of the run; advanced by `run`.
        callbacks: Called in this order.

    Attributes:
        engine: The engine around the transformer.
        callbacks: The callbacks.
        applied: The last step updated the weights; False where a gradient was not finite.
        stopping: All ranks know that the run was asked to stop.
        interrupted: The request was a user's Ctrl-C.
        saving: Some rank was writing a checkpoint in the background during the last step.
        finish_reason: What has ended the run before `train_iters`; empty if nothing has.
    """

    def __init__(
        self,
        *,
        train_step: TrainStep,
        meter: Meter,
        learning_rate: LearningRate,
        train_iters: int,
        log_interval: int,
        state: TrainState,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.state = state
        self.train_iters = train_iters
        self.learning_rate = learning_rate
        self.engine = train_step.engine
        self.applied = True
        self.stopping = False
        self.interrupted = False
        self.saving = False
        self.finish_reason = ""
        self._train_step = train_step
        self._meter = meter
        self._log_interval = log_interval
        self.callbacks = Callbacks(callbacks)
        self._skips_in_a_row = 0

    @property
    def complete(self) -> bool:
        """True when all steps are done, or a callback has finished the run."""
        return self.state.step >= self.train_iters or bool(self.finish_reason)

    def run(self) -> None:
        """Trains.

        Raises:
            TrainingError: The loss is not finite, or no step could be applied for long.

        Ranks: all.
        """
        try:
            self.callbacks.started(self)
            self._meter.restart()
            with collector_off_in_steps():
                while not self.complete and not self.stopping:
                    self._step()
                    with self._meter.paused():
                        self.callbacks.step_done(self)
                    collect_between_steps(self.state.step)
            self.callbacks.finished(self)
        except BaseException as error:
            self.callbacks.closed_after(error)
            raise
        self.callbacks.closed()

    def report(self, metrics: Metrics) -> None:
        """Hands metrics to all callbacks."""
        self.callbacks.reported(metrics)

    def finish(self, reason: str) -> None:
        """Completes the run at this step; on all ranks alike."""
        self.finish_reason = reason

    def asked_to_stop(self) -> bool:
        """Checks whether any rank was asked to stop while a callback worked, and sets `stopping` and
        `interrupted`.

        Ranks: all.
        """
        self._take_stop_level(self._train_step.stop_level())
        return self.stopping

    def _take_stop_level(self, level: int) -> None:
        self.stopping = self.stopping or level > 0
        self.interrupted = self.interrupted or level > 1

    def settle(self) -> None:
        """Brings `state` up to date with the finished steps, whose losses are read lazily.

        Ranks: all.
        """
        self._meter.fold_losses(self.state)

    def _step(self) -> None:
        state = self.state
        lr = self.learning_rate.at(state.step)
        result = self._train_step.step(
            state.step + 1, lr, before_update=lambda: self.callbacks.before_optimizer_step(self)
        )
        state.step += 1
        state.samples_consumed += result.num_samples
        self.applied, self.saving = result.applied, result.saving
        self._count_skip(result.applied)
        self._meter.add(result)
        self._take_stop_level(result.stop_level)
        if state.step % self._log_interval == 0 or state.step == 1 or self.complete or self.stopping:
            self.settle()
            measured = {**self.engine.metrics(), **self.callbacks.measure(self)}
            self.report(self._meter.read(state, lr=lr, grad_norm=result.grad_norm, measured=measured))
            self._meter.restart()

    def _count_skip(self, applied: bool) -> None:
        self._skips_in_a_row = 0 if applied else self._skips_in_a_row + 1
        self.state.skipped += not applied
        if self._skips_in_a_row >= _MOST_SKIPS_IN_A_ROW:
            error = TrainingError(
                f"step {self.state.step}: the gradients of {_MOST_SKIPS_IN_A_ROW} steps are not finite",
                expected="finite gradients",
                remedy="lower the learning rate, or train in bf16; the last checkpoint is intact",
            )
            error.ranks_agree = True
            raise error
