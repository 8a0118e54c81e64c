"""Living rank processes: starting processes and importing torch costs seconds, so runs share them."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from sat_train.testing.ports import HeldPort

TIMEOUT_MINUTES = 2  # of collectives; neither gloo's own default nor NCCL's
_MOST_RUNS = 10  # hooks of ZeRO-3 keep groups alive, whose threads wake 150 times a second
_GRACE_S = 5  # how long the others may take to fail too once one rank has failed


def start_process(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Starts a process that calls a module-level function: a fork of one that has imported what ranks need.

    Under a script, not under pytest, the caller's code needs `if __name__ == "__main__"`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sat_train.testing.imports"])
    process = context.Process(target=function, args=args, daemon=False)
    process.start()
    return process


StartProcess = Callable[..., BaseProcess]


def _serve(connection: Connection) -> None:
    """A rank process: takes calls until the test session ends."""
    import torch

    from sat_train.distributed.processes import stop_processes

    torch.set_num_threads(1)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _carry_out(*call)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            _destroy_engines()
            stop_processes()
            gc.collect()  # the run's groups end with it


def _carry_out(
    rank: int,
    world_size: int,
    port: int,
    model_parallel_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    from sat_train.distributed.environment import RankEnv
    from sat_train.distributed.processes import start_processes

    mesh = start_processes(
        RankEnv(rank, rank, world_size, world_size, "127.0.0.1", port, "torchrun"),
        device="cpu",
        model_parallel_size=model_parallel_size,
        timeout_minutes=TIMEOUT_MINUTES,
    )
    return function(mesh, *args)


_destroyed: weakref.WeakSet[Any] = weakref.WeakSet()


def _destroy_engines() -> None:
    """Hooks on gradients keep every engine, its groups and their threads alive until they are removed."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not deepspeed.comm.is_initialized():
        return
    engines = [each for each in gc.get_objects() if type(each) is deepspeed.DeepSpeedEngine]
    for engine in engines:
        if engine not in _destroyed:
            _destroyed.add(engine)
            engine.destroy()


class FailedOnRank(AssertionError):
    """A function raised on a rank; carries that rank's traceback."""


class RankPool:
    """Runs functions on gloo ranks. Processes start when first needed and live until `close` or `renew`.

    Each world size has its own: ZeRO-3 counts modules from the start of the process and compares the ranks.

    Args:
        start: Starts a process that calls a module-level function with an argument.
    """

    def __init__(self, start: StartProcess = start_process) -> None:
        self._start_process = start
        self._worlds: dict[int, list[tuple[Any, Connection]]] = {}
        self._runs: Counter[int] = Counter()

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        model_parallel_size: int = 1,
        timeout_s: float = 240,
    ) -> list[Any]:
        """Calls `function(mesh, *args)` on every rank and returns the results in rank order.

        Args:
            function: A module-level function; it, its arguments and its result are pickled.

        Raises:
            FailedOnRank: With the traceback of the first rank that raised; the next call starts new ones.
        """
        ranks = self._worlds.get(world_size) or self._start(world_size)
        self._runs[world_size] += 1
        with HeldPort() as port:
            for rank, (_, connection) in enumerate(ranks):
                connection.send((rank, world_size, port.number, model_parallel_size, function, args))
            results, failure = _collect(ranks, time.monotonic() + timeout_s)
        if failure or len(results) < world_size:
            self._end(world_size)
            missing = sorted(set(range(world_size)) - set(results))
            raise FailedOnRank(failure or f"ranks {missing} did not answer")
        return [results[rank] for rank in range(world_size)]

    def renew(self) -> None:
        """Ends processes that have served many runs. Call it where no run is compared with one before.

        After a run at ZeRO-3 a process computes linear layers by DeepSpeed, which rounds otherwise.
        """
        for world_size, runs in list(self._runs.items()):
            if runs >= _MOST_RUNS:
                self._end(world_size)

    def close(self) -> None:
        """Ends the processes."""
        for world_size in list(self._worlds):
            self._end(world_size)

    def _start(self, world_size: int) -> list[tuple[Any, Connection]]:
        ranks = self._worlds[world_size] = []
        for _ in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            process = self._start_process(_serve, theirs)  # the end of the pipe ends it
            theirs.close()
            ranks.append((process, ours))
        return ranks

    def _end(self, world_size: int) -> None:
        del self._runs[world_size]
        for process, connection in self._worlds.pop(world_size):
            connection.close()
            process.kill()
            process.join()


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> tuple[dict[int, Any], str]:
    """Waits for the ranks' answers; once one has failed, only a little longer."""
    results: dict[int, Any] = {}
    failure = ""
    while len(results) < len(ranks) and time.monotonic() < deadline:
        waiting = {connection: rank for rank, (_, connection) in enumerate(ranks) if rank not in results}
        for ready in wait(list(waiting), timeout=0.2):
            rank = waiting[cast(Connection, ready)]
            results[rank], problem = _receive(rank, ranks[rank][1])
            if problem and not failure:
                failure = problem
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return results, failure


def _receive(rank: int, connection: Connection) -> tuple[Any, str]:
    try:
        succeeded, value = connection.recv()
    except EOFError:
        return None, f"rank {rank} died"
    return (value, "") if succeeded else (None, f"rank {rank}:\n{value}")
