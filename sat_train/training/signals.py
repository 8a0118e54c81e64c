"""A polite request to stop: the handler only sets a flag, the loop acts on it between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType

from sat_train.log import get_logger

log = get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process has been asked to stop.

    The first signal lets the step end and the run save itself; a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def listen(self) -> None:
        """Takes over SIGTERM and SIGUSR1. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_name = signal.Signals(number).name
        log.warning("%s: stopping after this step", self.signal_name)
