"""Ends all ranks when one fails, with the first error as the last text on the screen.

The first rank that fails posts its message to a board in the store that all ranks share. The ranks show that
message, once on each machine, and not their own, which are most likely consequences. Each rank polls the
board in a thread, because a rank that waits in a collective would not notice otherwise.

The same thread sends the heartbeat of its rank and watches that of the next rank: a rank that is stopped or
killed cannot report itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch._C._distributed_c10d import Store

from sat_train.distributed.environment import RankEnv, tell_torchrun
from sat_train.distributed.meeting import announce, location_key, pulse_key, read_location, read_pulse
from sat_train.log import get_logger

log = get_logger(__name__)

_FIRST, _SHOWN, _READ, _ENDED = "first_failure", "shown", "read", "ended"  # keys in the store
_LOOK_EVERY_S = 1.0
# How long a failed rank waits for the others to read its message: they poll every second, but may still be
# importing torch if they have not met yet.
_STAY_S, _STAY_FOR_LATE_ONES_S = 10.0, 40.0
# A silent rank is reported before the backend times out, whose message names no rank.
_SILENCE = 0.9
_LAST_SAVE_S = 300.0


@dataclass(frozen=True)
class RankFailure:
    """The first failure of a run, as all ranks show it.

    Args:
        message: Text to show.
        exit_code: Exit code of all ranks.
        time: Time of the report, in seconds since 1970.
    """

    message: str
    exit_code: int
    time: int


class FailureBoard:
    """Board in the shared store with the first failure and the heartbeats of all ranks.

    Args:
        store: Store that all ranks share.
        env: Rank of this process.
        timeout: Time that the run waits for a rank.
    """

    def __init__(self, store: Store, env: RankEnv, timeout: timedelta) -> None:
        self._owner = store  # on rank 0 the store itself, which ends with its last reference
        self._store = store.clone()  # a separate connection: the first one may block for minutes
        self._env = env
        self._silence_s = _SILENCE * timeout.total_seconds()
        self._every_s = min(_LOOK_EVERY_S, self._silence_s / 10)
        self._beats = 0
        self._failing = threading.Event()  # this rank reports a failure of its own
        self._closing = threading.Event()  # its work is done
        self._left = threading.Event()

    def watch(self) -> None:
        """Starts the threads that end this process when another rank fails or falls silent."""
        if self._env.world_size == 1:
            return
        threading.Thread(target=self._look, name="failure-watch", daemon=True).start()
        threading.Thread(target=self._watch_the_store, name="store-watch", daemon=True).start()

    def close(self) -> None:
        """Waits until all ranks have finished, so that a rank that fails at the very end can still report.

        Ranks: all.
        """
        self._closing.set()
        if self._env.world_size > 1:
            self._meet_again(_ENDED, limit_s=None)
        self._left.set()

    def report(self, message: str, exit_code: int, *, agreed: bool = False) -> RankFailure:
        """Reports a failure of this rank, and shows the first failure of all ranks, once on each machine.

        Returns when all ranks have read it, or after a while: the launcher ends all ranks once one has
        exited.

        Args:
            message: Text of the failure.
            exit_code: Exit code of this rank.
            agreed: Whether all ranks report the same failure, so that rank 0 reports for all.

        Returns:
            The first failure.
        """
        self._failing.set()
        mine = RankFailure(f"rank {self._env.rank}: {message}", exit_code, int(time.time()))
        first: list[RankFailure] = []

        def post() -> None:
            first.append(self._post(mine, message, agreed))

        # in a thread, because the store may have stopped with the rank that holds it
        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        thread.join(_STAY_FOR_LATE_ONES_S + _STAY_S)
        if not first:
            _show(f"{mine.message}\n(the store of the run, on {self._env.master_addr}, does not answer)")
        return first[0] if first else mine

    def describe_loss(self) -> str:
        """Returns a sentence about lost ranks, empty if there are none. Takes some seconds."""
        try:
            silent = self._silent_ranks()
        except RuntimeError:
            return f"{self._store_has_gone()}: rank 0 or its launcher was killed"
        return self.describe(silent) if silent else ""

    def _silent_ranks(self) -> list[int]:
        """Returns the ranks without a heartbeat.

        Empty if another rank has already reported a failure.

        Raises:
            RuntimeError: The store has gone.
        """
        others = [rank for rank in range(self._env.world_size) if rank != self._env.rank]
        before = [read_pulse(self._store, rank) for rank in others]
        time.sleep(4 * self._every_s)
        after = [read_pulse(self._store, rank) for rank in others]
        is_known = self._store.check([_FIRST])
        return [] if is_known else [o for o, b, a in zip(others, before, after, strict=True) if a == b]

    def describe(self, ranks: Sequence[int]) -> str:
        """Returns a sentence about ranks that have fallen silent."""
        names = []
        for rank in ranks:
            location = read_location(self._store, rank) if self._announced([rank]) else None
            names.append(
                f"rank {rank}" + (f" (process {location.pid} on {location.host})" if location else "")
            )
        return (
            f"no sign of life from {', '.join(names)}\n"
            "  expected: a running process on a machine that can be reached\n"
            "  remedy:   check that machine; `dmesg` there names a process that was killed for lack of memory"
        )

    def _post(self, mine: RankFailure, message: str, agreed: bool) -> RankFailure:
        try:
            was_called = self._announced([self._env.rank])
            limit_s = _STAY_S if was_called else _STAY_FOR_LATE_ONES_S
            # a fault found before the ranks have met is usually the same on all of them
            if agreed or not was_called:
                mine = self._speak_for_all(mine, message, limit_s)
            text = json.dumps(asdict(mine))
            first = RankFailure(**json.loads(self._store.compare_set(_FIRST, "", text)))
            announce(self._store, self._env)
        except RuntimeError:
            _show(f"{mine.message}\n({self._store_has_gone()})")
            return mine
        self._pass_on(first, limit_s)
        return first

    def _pass_on(self, first: RankFailure, limit_s: float) -> None:
        """Shows the failure unless this machine has shown it, and waits until all ranks have read it."""
        try:
            if self._store.add(f"{_SHOWN}/{socket.gethostname()}", 1) == 1:
                _show(first.message)
                tell_torchrun(first.message, first.time)
            else:
                tell_torchrun("ended by the failure of another rank", first.time + 1)
            self._meet_again(_READ, limit_s)
        except RuntimeError:  # rank 0 has read it and left with the store
            pass

    def _speak_for_all(self, mine: RankFailure, message: str, limit_s: float) -> RankFailure:
        """Omits the rank on rank 0; on other ranks, gives rank 0 time to report first."""
        if self._env.rank == 0:
            return replace(mine, message=message)
        have_met = self._announced([self._env.rank])
        end = time.monotonic() + (_STAY_S / 2 if have_met else limit_s)
        while not self._store.check([_FIRST]) and time.monotonic() < end:
            if not have_met and self._announced([0]):
                break
            time.sleep(0.1)
        return mine

    def _meet_again(self, key: str, limit_s: float | None) -> None:
        try:
            self._store.set(f"{key}/{self._env.rank}", "")
            self._wait_for([f"{key}/{rank}" for rank in range(self._env.world_size)], limit_s)
        except RuntimeError:  # the rank that holds the store was the last one, and has left
            pass

    def _wait_for(self, keys: list[str], limit_s: float | None) -> None:
        end = time.monotonic() + (limit_s if limit_s is not None else float("inf"))
        while not self._store.check(keys) and time.monotonic() < end:
            time.sleep(0.1)

    def _announced(self, ranks: Iterable[int]) -> bool:
        return self._store.check([location_key(rank) for rank in ranks])

    def _look(self) -> None:
        following = (self._env.rank + 1) % self._env.world_size
        last, unchanged = b"", 0
        while not self._left.is_set():
            try:
                self._beats += 1
                self._store.set(pulse_key(self._env.rank), str(self._beats))
                if not self._failing.is_set() and self._store.check([_FIRST]):
                    self._follow(RankFailure(**json.loads(self._store.get(_FIRST))))
                pulse = read_pulse(self._store, following)
            except RuntimeError:
                return self._lose_the_store()
            unchanged = unchanged + 1 if pulse and pulse == last else 0
            last = pulse
            # counted in polls of this thread, so that a rank that was itself asleep does not blame others
            if unchanged * self._every_s > self._silence_s and not self._failing.is_set():
                self._left.set()
                self._leave(self.report(self.describe([following]), 1).exit_code)
            self._left.wait(self._every_s)
        return None

    def _follow(self, first: RankFailure) -> None:
        self._left.set()
        self._pass_on(first, _STAY_S)
        if not self._failing.is_set():
            self._leave(first.exit_code)

    def _store_has_gone(self) -> str:
        return f"the store of the run, on {self._env.master_addr}, has gone"

    def _leave(self, exit_code: int) -> None:
        sys.stdout.flush()
        os._exit(exit_code)

    def _lose_the_store(self) -> None:
        """Asks the loop to save, if it still can, and ends: the store was lost with rank 0 or torchrun."""
        if self._failing.wait(_STAY_S) or self._closing.is_set():
            return
        log.warning("%s: rank 0 or its launcher was killed", self._store_has_gone())
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._left.wait(_LAST_SAVE_S):
            self._leave(1)

    def _watch_the_store(self) -> None:
        """Ends this process if the store does not answer: the rank that holds it may have been stopped."""
        beats, unchanged = -1, 0
        while not self._left.wait(self._every_s):
            unchanged = unchanged + 1 if self._beats == beats else 0
            beats = self._beats
            if unchanged * self._every_s > self._silence_s and not self._failing.is_set():
                _show(f"no sign of life from rank 0 on {self._env.master_addr}, which holds the run's store")
                self._leave(1)


def _show(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
