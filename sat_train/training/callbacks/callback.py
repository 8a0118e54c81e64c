"""What a side-concern of the loop may listen to, and how the loop calls all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sat_train.errors import SatTrainError, TrainingError
from sat_train.log import get_logger
from sat_train.training.metrics import Metrics

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer

log = get_logger(__name__)


class Callback:
    """Does nothing; override what is needed. Those that only rank 0 has must not call collectives."""

    # True for what only reports: training continues whatever it raises. One that calls collectives raises
    # such an error on all ranks alike, or a TrainingError, which always ends the run.
    optional = False

    def started(self, trainer: Trainer) -> None:
        """Before the first step."""

    def step_done(self, trainer: Trainer) -> None:
        """After each step."""

    def reported(self, metrics: Metrics) -> None:
        """There is a new metrics."""

    def finished(self, trainer: Trainer) -> None:
        """After the last step, whether the run is complete or was asked to stop. Not after an error."""

    def closed(self) -> None:
        """At the very end, also after an error."""


class Callbacks:
    """All callbacks of a run, called in their order.

    An optional one that raises is reported once, with its cause, and called again the next time.

    Args:
        callbacks: The callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self._said: set[tuple[Callback, type[Exception]]] = set()

    def started(self, trainer: Trainer) -> None:
        """Before the first step."""
        for callback in self._callbacks:
            self._call(callback, "started", trainer)

    def step_done(self, trainer: Trainer) -> None:
        """After each step."""
        for callback in self._callbacks:
            self._call(callback, "step_done", trainer)

    def reported(self, metrics: Metrics) -> None:
        """There is a new metrics."""
        for callback in self._callbacks:
            self._call(callback, "reported", metrics)

    def finished(self, trainer: Trainer) -> None:
        """After the last step, not after an error."""
        for callback in self._callbacks:
            self._call(callback, "finished", trainer)

    def closed(self) -> None:
        """Closes each of them, whatever another one raises.

        Raises:
            Exception: The first error of those that are not optional.
        """
        first: Exception | None = None
        for callback in self._callbacks:
            try:
                self._call(callback, "closed")
            except Exception as error:
                log.error("%s, while it was closed: %s", _name(callback), cause_of(error))
                first = first or error
        if first is not None:
            raise first

    def closed_after(self, error: BaseException) -> None:
        """Closes each of them after an error, which stays the one that is shown."""
        try:
            self.closed()
        except Exception as other:
            log.debug("besides %r: %r", error, other)  # `closed` has said it

    def _call(self, callback: Callback, method: str, *args: object) -> None:
        try:
            getattr(callback, method)(*args)
        except Exception as error:
            if not callback.optional or isinstance(error, TrainingError):
                raise
            if (callback, type(error)) not in self._said:
                self._said.add((callback, type(error)))
                log.error("%s failed, training continues: %s", _name(callback), cause_of(error))
            log.debug("%s.%s", _name(callback), method, exc_info=True)


def _name(callback: Callback) -> str:
    return type(callback).__name__


def cause_of(error: Exception) -> str:
    """Returns an error in words; of one that nobody foresaw also its kind."""
    return str(error) if isinstance(error, SatTrainError) else f"{type(error).__name__}: {error}"
