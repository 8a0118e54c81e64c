"""Inspects many clips in parallel, in processes that no clip can stop by crashing or hanging."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.sources.records import ClipRecord
from sat_train.errors import DataError

Found = TypeVar("Found")

_POLL_S = 1.0
_GRACE_S = 2.0  # beyond the deadline that a worker observes itself
_FORK = multiprocessing.get_context("fork")  # functions need not be picklable, and nothing is imported again


def look_into_clips(
    records: Sequence[ClipRecord],
    look: Callable[[ClipRecord], Found],
    *,
    num_processes: int,
    timeout_s: float | None = None,
    on_clip: Callable[[], None] = lambda: None,
) -> list[Found | BadClip]:
    """Calls a function for each clip.

    Args:
        records: The clips.
        look: Called in another process, which sends back its result. May raise BadClip.
        num_processes: Largest number of processes.
        timeout_s: Time after which a clip is abandoned and its process killed; None: never.
        on_clip: Called after each clip, in this process.

    Returns:
        The result for each clip, or the reason why it is bad, in the order of `records`.

    Raises:
        DataError: A process dies before it has a clip.
    """
    pool = _Pool(records, look, timeout_s, on_clip)
    try:
        return pool.run(min(num_processes, len(records)))
    finally:
        pool.close()


def prepare_worker(worker_id: int = 0) -> None:
    """Leaves signals to the training process, and makes the worker end together with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: Linux only, as this project


class _Worker:
    """A worker process with its pipe, its current clip and the time it started on it."""

    def __init__(self, records: Sequence[ClipRecord], look: Callable[[ClipRecord], Any]) -> None:
        self.pipe, theirs = _FORK.Pipe()
        self.index: int | None = None
        self.since = 0.0
        self.process = _FORK.Process(target=_serve, args=(theirs, self.pipe, records, look), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, index: int | None) -> None:
        self.index, self.since = index, time.monotonic()
        if index is not None:
            self.pipe.send(index)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Pool:
    """The loop that hands out clips and supervises the workers."""

    def __init__(
        self,
        records: Sequence[ClipRecord],
        look: Callable[[ClipRecord], Any],
        timeout_s: float | None,
        on_clip: Callable[[], None],
    ) -> None:
        self._records, self._look = records, look
        self._timeout_s, self._on_clip = timeout_s, on_clip
        self._found: list[Any] = [None] * len(records)
        self._next = 0
        self._workers: list[_Worker] = []

    def run(self, num_processes: int) -> list[Any]:
        for _ in range(num_processes):
            self._start()
        while busy := {worker.pipe: worker for worker in self._workers if worker.index is not None}:
            ready = connection.wait(list(busy), timeout=_POLL_S)
            for pipe, worker in busy.items():
                if pipe in ready:
                    self._receive(worker)
            for worker in busy.values():
                self._check_time(worker)
        return self._found

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _start(self) -> None:
        worker = _Worker(self._records, self._look)
        self._workers.append(worker)
        self._give_next(worker)

    def _give_next(self, worker: _Worker) -> None:
        index = self._next if self._next < len(self._records) else None
        self._next += index is not None
        try:
            worker.give(index)
        except OSError:
            raise DataError(
                f"worker process {worker.process.pid}, which inspects clips, died at its start",
                remedy="check that there is enough memory; `dmesg` names a process killed for lack of it",
            ) from None

    def _receive(self, worker: _Worker) -> None:
        try:
            result = worker.pipe.recv()
        except (EOFError, OSError):
            self._lose(worker, BadClip("worker died", "the process that read it ended"))
            return
        if isinstance(result, BaseException) and not isinstance(result, BadClip):
            raise result
        self._take(worker, result)
        self._give_next(worker)

    def _check_time(self, worker: _Worker) -> None:
        if self._timeout_s is None or worker.index is None:
            return
        if time.monotonic() - worker.since > 1.2 * self._timeout_s + _GRACE_S:
            detail = f"reading hangs (data.worker_timeout_s = {self._timeout_s:g})"
            self._lose(worker, BadClip("timeout", detail))

    def _lose(self, worker: _Worker, reason: BadClip) -> None:
        self._take(worker, reason)
        worker.kill()
        self._workers.remove(worker)
        if self._next < len(self._records):
            self._start()

    def _take(self, worker: _Worker, result: Any) -> None:
        assert worker.index is not None, "an idle worker has no result"
        self._found[worker.index] = result
        worker.index = None
        self._on_clip()


def _serve(pipe: Any, parents: Any, records: Sequence[ClipRecord], look: Callable[[ClipRecord], Any]) -> None:
    """Runs a worker until its parent has no more clips or is gone."""
    parents.close()
    prepare_worker()
    while True:
        try:
            record = records[pipe.recv()]
        except EOFError:
            os._exit(0)
        try:
            with one_clip():
                result = look(record)
        except Exception as error:
            result = error
        pipe.send(result)
