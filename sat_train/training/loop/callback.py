"""Events of the training loop, and the callbacks that listen to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sat_train.checkpoint.fragments import Fragment, SavedFragments
from sat_train.config import RunConfig
from sat_train.config.learning_rate import LearningRate
from sat_train.data.batches import LoadedBatch
from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.engine import TrainEngine
from sat_train.errors import SatTrainError, TrainingError
from sat_train.log import get_logger
from sat_train.objective.training_inputs import LossOutput
from sat_train.training.loop.metrics import Metrics
from sat_train.training.loop.state import TrainState

log = get_logger(__name__)
T = TypeVar("T")


class Training(Protocol):
    """The training loop, as a callback sees it: `Trainer`.

    Attributes:
        engine: The engine around the transformer.
        callbacks: All callbacks of the run.
        state: Step and smoothed loss.
        train_iters: Step at which the run is complete.
        learning_rate: Rate by step.
        applied: The last step updated the weights; False where a gradient was not finite.
        stopping: All ranks know that the run was asked to stop.
        saving: Some rank was writing a checkpoint in the background during the last step.
    """

    engine: TrainEngine
    callbacks: Callbacks
    state: TrainState
    train_iters: int
    learning_rate: LearningRate
    applied: bool
    stopping: bool
    saving: bool

    @property
    def complete(self) -> bool:
        """All steps are done."""

    def report(self, metrics: Metrics) -> None:
        """Hands metrics to all callbacks."""

    def asked_to_stop(self) -> bool:
        """Asks all ranks whether any was asked to stop while a callback worked. Ranks: all."""

    def finish(self, reason: str) -> None:
        """Completes the run at this step, as if it were the last; on all ranks alike.

        Args:
            reason: What has ended it, for the log.
        """

    def settle(self) -> None:
        """Brings `state` up to date with the steps done. Ranks: all."""


@dataclass(frozen=True)
class CallbackContext:
    """Context in which a registered callback is built, besides its parameters.

    Args:
        config: The configuration.
        mesh: The process mesh.
        run_directory: The run directory; None for a run that keeps nothing.
    """

    config: RunConfig
    mesh: ProcessMesh
    run_directory: Path | None

    def folder(self) -> Path:
        """Returns the run directory for what `writes_files`, which a run without one does not have."""
        assert self.run_directory is not None, "its record says `writes_files`"
        return self.run_directory


class Callback:
    """A side-concern of the training loop. Every method does nothing; override what is needed.

    A callback that only rank 0 has must not call collectives.
    """

    # True for what only reports: training continues whatever it raises. One that calls collectives raises
    # such an error on all ranks alike, or a TrainingError, which always ends the run.
    optional = False

    def started(self, trainer: Training) -> None:
        """Before the first step."""

    def loss_computed(self, output: LossOutput, batch: LoadedBatch) -> None:
        """After each forward pass of training; reading its losses here would wait for the device."""

    def before_optimizer_step(self, trainer: Training) -> None:
        """Between the last backward pass of a step and its update: `trainer.engine.gradients()` are there.

        `trainer.state.step` is the number of steps before this one.
        """

    def step_done(self, trainer: Training) -> None:
        """After each step."""

    def measure(self, trainer: Training) -> Mapping[str, float]:
        """Returns numbers that belong to the metrics of a logged step, by name."""
        return {}

    def reported(self, metrics: Metrics) -> None:
        """There are new metrics."""

    def before_save(self, trainer: Training) -> None:
        """Before a checkpoint is written, on all ranks."""

    def saved(self, step: int) -> None:
        """A checkpoint was committed, perhaps some steps after its own, on all ranks."""

    def finished(self, trainer: Training) -> None:
        """After the last step, whether the run is complete or was asked to stop. Not after an error."""

    def failed(self, error: BaseException) -> None:
        """After an error, before `closed`; that error stays the one that is shown."""

    def closed(self) -> None:
        """At the very end, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of this callback, as JSON has it. Rank 0's is saved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave at the step that the run resumes, before `started`."""

    def add_tensors(self, fragments: Sequence[Fragment]) -> Sequence[Fragment]:
        """Returns the trained state of this rank with this callback's tensors, which are saved with it.

        A save copies them while the next step computes: they may change from its `before_optimizer_step` on.
        """
        return fragments

    def load_tensors(self, saved: SavedFragments) -> None:
        """Restores the tensors of the step that the run resumes.

        Raises:
            CheckpointError: They are not there.
        """


class Callbacks:
    """All callbacks of a run, called in their order.

    An optional one that raises is reported once, with its cause, and called again the next time.

    Args:
        callbacks: The callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self._keys = _unique_names(self._callbacks)
        self._reported: set[tuple[Callback, type[Exception]]] = set()

    def started(self, trainer: Training) -> None:
        """Before the first step."""
        self._each(lambda callback: callback.started(trainer))

    def loss_computed(self, output: LossOutput, batch: LoadedBatch) -> None:
        """After each forward pass of training."""
        self._each(lambda callback: callback.loss_computed(output, batch))

    def before_optimizer_step(self, trainer: Training) -> None:
        """Between the last backward pass and the update."""
        self._each(lambda callback: callback.before_optimizer_step(trainer))

    def step_done(self, trainer: Training) -> None:
        """After each step."""
        self._each(lambda callback: callback.step_done(trainer))

    def measure(self, trainer: Training) -> dict[str, float]:
        """Returns the numbers of all callbacks."""
        measured = self._each(lambda callback: callback.measure(trainer))
        return {name: value for numbers in measured for name, value in numbers.items()}

    def reported(self, metrics: Metrics) -> None:
        """There are new metrics."""
        self._each(lambda callback: callback.reported(metrics))

    def before_save(self, trainer: Training) -> None:
        """Before a checkpoint is written."""
        self._each(lambda callback: callback.before_save(trainer))

    def saved(self, step: int) -> None:
        """A checkpoint was committed."""
        self._each(lambda callback: callback.saved(step))

    def finished(self, trainer: Training) -> None:
        """After the last step, not after an error."""
        self._each(lambda callback: callback.finished(trainer))

    def failed(self, error: BaseException) -> None:
        """After an error."""
        self._each(lambda callback: callback.failed(error))

    def closed(self) -> None:
        """Closes each of them, whatever another one raises.

        Raises:
            Exception: The first error of those that are not optional.
        """
        first: Exception | None = None
        for callback in self._callbacks:
            try:
                self._call(callback, lambda callback: callback.closed())
            except Exception as error:
                log.error("%s, while it was closed: %s", _name(callback), cause_of(error))
                first = first or error
        if first is not None:
            raise first

    def closed_after(self, error: BaseException) -> None:
        """Reports an error, which stays the one that is shown, to each of them, and closes them."""
        for tell in (lambda: self.failed(error), self.closed):
            try:
                tell()
            except Exception as other:
                log.debug("besides %r: %r", error, other)  # `closed` has said it

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the states of those that have one, by class name; a second of a class is `Name 2`."""
        states = self._each(lambda callback: (self._keys[callback], callback.state_dict()))
        return {name: state for name, state in states if state}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores the state of each callback; one that had none starts from scratch."""
        self._each(
            lambda callback: (
                callback.load_state_dict(states[self._keys[callback]])
                if self._keys[callback] in states
                else None
            )
        )

    def add_tensors(self, fragments: Sequence[Fragment]) -> Sequence[Fragment]:
        """Returns the trained state of this rank with the tensors of all callbacks."""
        for callback in self._callbacks:
            (fragments,) = self._call(callback, _adding(fragments)) or (fragments,)
        return fragments

    def load_tensors(self, saved: SavedFragments) -> None:
        """Restores the tensors of each callback.

        Raises:
            CheckpointError: They are not there.
        """
        self._each(lambda callback: callback.load_tensors(saved))

    def _each(self, call: Callable[[Callback], T]) -> list[T]:
        """Calls all; returns what those returned that did not fail."""
        results = [self._call(callback, call) for callback in self._callbacks]
        return [result for returned in results for result in returned]

    def _call(self, callback: Callback, call: Callable[[Callback], T]) -> tuple[T] | tuple[()]:
        try:
            return (call(callback),)
        except Exception as error:
            if not callback.optional or isinstance(error, TrainingError):
                raise
            if (callback, type(error)) not in self._reported:
                self._reported.add((callback, type(error)))
                log.error("%s failed, training continues: %s", _name(callback), cause_of(error))
            log.debug("%s", _name(callback), exc_info=True)
            return ()


def _adding(fragments: Sequence[Fragment]) -> Callable[[Callback], Sequence[Fragment]]:
    return lambda callback: callback.add_tensors(fragments)


def _unique_names(callbacks: Sequence[Callback]) -> dict[Callback, str]:
    counts = Counter[str]()
    names = {}
    for callback in callbacks:
        counts[_name(callback)] += 1
        count = counts[_name(callback)]
        names[callback] = _name(callback) if count == 1 else f"{_name(callback)} {count}"
    return names


def _name(callback: Callback) -> str:
    return type(callback).__name__


def cause_of(error: Exception) -> str:
    """Returns an error in words; of one that nobody foresaw also its kind."""
    return str(error) if isinstance(error, SatTrainError) else f"{type(error).__name__}: {error}"
