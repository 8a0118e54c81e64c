"""Writes the files of a save in a thread, from a copy in host memory, while training continues.

The thread makes the copy too, during the forward and backward passes of the next step: they change nothing of
what is saved. The update waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sat_train.checkpoint.host_copy import HostCopy
from sat_train.checkpoint.in_flight import SaveInFlight
from sat_train.checkpoint.publish import RankReport
from sat_train.checkpoint.run_state import RunState
from sat_train.distributed.host_memory import spare_host_memory
from sat_train.log import get_logger

log = get_logger(__name__)

_MIB = 2**20
_LARGEST_SHARE = 0.5  # of the host's spare memory, for the copies of all its ranks


class BackgroundWriter:
    """Writes one state at a time; the next one waits until the caller has asked for the report of the last.

    Args:
        only_with_room: Copy only where the copies of all ranks of this machine take at most half of the
            memory that it has to spare; elsewhere the caller waits for the files.
        ranks_here: Ranks on this machine.

    Attributes:
        in_flight: The last save.
    """

    def __init__(self, *, only_with_room: bool, ranks_here: int = 1) -> None:
        self._only_with_room, self._ranks_here = only_with_room, ranks_here
        self.in_flight: SaveInFlight | None = None
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()

    @property
    def is_writing(self) -> bool:
        """True while the thread writes."""
        return self._thread is not None and self._thread.is_alive()

    def wait_until_copied(self) -> None:
        """Waits until the state may change again."""
        self._is_copied.wait()

    def start(self, state: RunState, write: Callable[[RunState], RankReport]) -> Callable[[], RankReport]:
        """Begins to copy a state and to write the copy; where there is no room for one, writes the state.

        Args:
            state: May change once `wait_until_copied` has returned.
            write: Writes it; reports a failure instead of raising.

        Returns:
            A function that waits for the files and returns the report.
        """
        assert not self.is_writing, "the last write has not been waited for"
        copy = self._prepared(state)
        if copy is None:
            report = self._posted(write(state))
            return lambda: report
        reports: list[RankReport] = []
        copies = [copy]  # popped, so that the state is free once it is copied
        del copy, state

        def copy_and_write() -> None:
            reports.append(self._posted(self._written(copies, write)))

        self._is_copied.clear()
        thread = self._thread = threading.Thread(target=copy_and_write, name="checkpoint", daemon=True)
        thread.start()

        def wait() -> RankReport:
            thread.join()
            return reports[0]

        return wait

    def finish_alone(self) -> None:
        """Waits for the last save after an error of this rank that the others do not have."""
        if self.in_flight is not None:
            self.in_flight.finish_alone()

    def _written(
        self, copies: list[Callable[[], RunState]], write: Callable[[RunState], RankReport]
    ) -> RankReport:
        try:
            copied = copies.pop()()
        except Exception as error:  # the other ranks wait for the report
            return RankReport(failure=f"the copy in host memory: {error!r}"[:300])
        finally:
            self._is_copied.set()
        return write(copied)

    def _posted(self, report: RankReport) -> RankReport:
        return report if self.in_flight is None else self.in_flight.post(report)

    def _prepared(self, state: RunState) -> Callable[[], RunState] | None:
        """Returns the function that copies the state; None where there is no room for a copy."""
        tensors = state.tensors
        needed = self._copy.missing_bytes(tensors)
        if needed and not self._has_room(needed):
            return None
        try:
            copy = self._copy.prepare(tensors)
        except (RuntimeError, MemoryError) as error:
            log.warning("no copy of the state in host memory, training waits for this save: %s", error)
            return None
        if needed:
            log.info(
                "saves are written in the background, from a copy of %.0f MiB in host memory", needed / _MIB
            )
        return lambda: state.with_tensors(copy())

    def _has_room(self, needed: int) -> bool:
        if not self._only_with_room:
            return True
        spare = spare_host_memory()
        if needed * self._ranks_here <= _LARGEST_SHARE * spare:
            return True
        log.info(
            "training waits for saves: copies of %.0f MiB for each of %d ranks would take more than half of "
            "the %.0f MiB that this machine can spare (args.async_save)",
            *(needed / _MIB, self._ranks_here, spare / _MIB),
        )
        return False
