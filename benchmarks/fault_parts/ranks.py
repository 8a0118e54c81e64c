"""Rank processes that start in a moment: forked from a process that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from benchmarks.fault_parts.injection import Injection
from sat_train.testing.ports import HeldPort

_PRELOADED = ["sat_train.testing.imports", "sat_train.cli.ranks"]
_GRACE_S = 30.0  # a launcher ends the others at once; here they have to notice by themselves
_LAST_GRACE_S = 60.0


@dataclass(frozen=True)
class Ended:
    """Outcome of the ranks of one run.

    Args:
        codes: Exit codes, negative for a signal; None for a rank that had to be killed.
        hung: Some rank neither ended by itself nor when it was asked to, as a launcher asks.
        output: What all ranks printed.
    """

    codes: tuple[int | None, ...]
    hung: bool
    output: str

    @property
    def succeeded(self) -> bool:
        return all(code == 0 for code in self.codes)


class WarmRanks:
    """Starts training runs of several ranks on this machine."""

    def __init__(self) -> None:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        first = self._context.Process(target=os.getpid)  # it imports: the time of a run is that of all others
        first.start()
        first.join()

    def start(
        self, words: Sequence[str], *, ranks: int, log: Path, injection: Injection | None = None
    ) -> RunningRanks:
        """Starts `sat-train train` on so many ranks.

        Args:
            words: Its command line.
            ranks: How many.
            log: Gets what they print.
            injection: What goes wrong inside them.
        """
        port = HeldPort()
        processes = []
        for rank in range(ranks):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port.number),
            }
            process = self._context.Process(target=_train, args=(variables, list(words), str(log), injection))
            process.start()
            processes.append(process)
        return RunningRanks(processes, log, port)


class RunningRanks:
    """Ranks that train."""

    def __init__(self, processes: list[ForkServerProcess], log: Path, port: HeldPort) -> None:
        self._processes = processes
        self._log = log
        self._port = port

    def signal(self, number: signal.Signals, *, ranks: Sequence[int]) -> None:
        """Sends a signal to some ranks, if they still live."""
        for rank in ranks:
            process = self._processes[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def wait(self, *, timeout_s: float) -> Ended:
        """Waits for the end; once a rank has failed the others get a little time, as under a launcher."""
        deadline = time.monotonic() + timeout_s
        while self.is_running() and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in self._processes):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
                self._join(deadline)
                break
            time.sleep(0.05)
        self.signal(signal.SIGTERM, ranks=range(len(self._processes)))
        self._join(time.monotonic() + _LAST_GRACE_S)
        hung = self.is_running()
        codes = tuple(process.exitcode for process in self._processes)
        for process in self._processes:
            process.kill()
            process.join()
        self._port.close()
        return Ended(codes, hung, self.output())

    def _join(self, deadline: float) -> None:
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))


def _train(variables: dict[str, str], words: list[str], log: str, injection: Injection | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    if injection is not None:
        injection.install()
    from sat_train.cli.ranks import train

    sys.exit(train(words))
