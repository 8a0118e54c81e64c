"""A request to stop: Ctrl-C at a terminal, or a signal of a scheduler.

The loop acts on it between two steps. A thread receives every signal too, through Python's wake-up
descriptor. Unlike a handler, it can log safely, and it can end a process whose main thread waits in a
collective, where no handler runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import ClassVar

from sat_train.errors import Stopped
from sat_train.log import get_logger

log = get_logger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal, torchrun and SLURM may each send a signal for the same key press or decision.
_ONE_REQUEST_S = 1.0
# An exception of a handler is lost in destructors and fork hooks, so it is raised again after this time.
_AGAIN_S = 0.1
# A handler runs once the main thread is back in Python, which one that waits for a lost rank never is.
_UNHEARD_S = 5.0
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


class StopRequest:
    """A request to stop this process; true once a signal has arrived.

    Before `defer` SIGINT and SIGTERM raise `Stopped` at once, or end the process after five seconds in which
    its main thread waited outside of Python, as for a rank that is gone. After it the first signal is
    remembered, so that the step can end and the run save itself. A second SIGINT or SIGTERM, more than a
    second later, ends the process at once. SIGUSR1 is a scheduler's early warning: it is always remembered,
    and a second one changes nothing.

    Args:
        nothing_yet: Message of `Stopped`.
        unit: Unit of work that is finished before stopping.
    """

    _listening: ClassVar[StopRequest | None] = None  # the request of this process that receives its signals

    def __init__(
        self, nothing_yet: str = "stopped before the first step; nothing was trained", *, unit: str = "step"
    ) -> None:
        self._unit = unit
        self.signal_name = ""
        self._nothing_yet = nothing_yet
        self._deferred = False
        self._raised = ""
        self._asked_at: float | None = None

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    @property
    def level(self) -> int:
        """Origin of the request: 0 none, 1 a scheduler, 2 Ctrl-C. Ranks agree on the highest."""
        return {"": 0, "SIGINT": 2}.get(self.signal_name, 1)

    def listen(self) -> StopRequest:
        """Handles SIGINT, SIGTERM and SIGUSR1, instead of any earlier request. Main thread only."""
        is_first = StopRequest._listening is None
        StopRequest._listening = self
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if is_first:
            _install()
        return self

    def defer(self) -> None:
        """Stops a first signal from interrupting: from now on there is work to save."""
        self._deferred = True
        if self._raised and not self.signal_name:  # lost before: acted on after the first step
            self.signal_name = self._raised

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred or number == signal.SIGUSR1:
            self.signal_name = self.signal_name or signal.Signals(number).name
        elif not self._raised:
            self._raised = signal.Signals(number).name
            raise Stopped(number, f"{signal.Signals(number).name}: {self._nothing_yet}")

    def _raise_again(self, number: int) -> None:
        self._raised = ""
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    def _end_unheard(self, number: signal.Signals) -> None:
        """Ends a process that has nothing to save and whose main thread does not come back to hear it."""
        if not self._raised and not self._deferred:
            log.error("%s while waiting, perhaps for another rank: %s", number.name, self._nothing_yet)
            os._exit(128 + number)

    def _answer(self, number: signal.Signals, now: float) -> None:
        if number != signal.SIGUSR1 and self._asked_at is not None and now - self._asked_at > _ONE_REQUEST_S:
            log.info("%s again: ended at once; what was saved is intact", number.name)
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)
            os._exit(128 + number)  # the main thread may wait in a collective forever
        if number != signal.SIGUSR1 and self._asked_at is None:
            self._asked_at = now
            if self._deferred:
                log.info("%s: stopping after this %s; once more ends at once", number.name, self._unit)
            else:
                unheard = threading.Timer(_UNHEARD_S, self._end_unheard, (number,))
                unheard.daemon = True
                unheard.start()
        elif number == signal.SIGUSR1:
            log.info("SIGUSR1: stopping after this %s", self._unit)


def _install() -> None:
    """Sends signals, and exceptions of handlers that destructors have lost, to the listening request."""
    receiver, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
    # a signal to a forked child is not one to this process
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_hear, args=(receiver,), name="stop-signals", daemon=True).start()
    show_unraisable = sys.unraisablehook

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, Stopped) and (request := StopRequest._listening) is not None:
            request._raise_again(lost.exc_value.signal_number)
        else:
            show_unraisable(lost)

    sys.unraisablehook = raise_again


def _hear(descriptor: int) -> None:
    while True:
        for number in os.read(descriptor, 64):
            if number in STOP_SIGNALS and (request := StopRequest._listening) is not None:
                request._answer(signal.Signals(number), time.monotonic())
