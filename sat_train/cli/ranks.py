"""Trains, samples or precomputes on all ranks, from the command line to an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from sat_train.cli.usage import print_usage, wants_help
from sat_train.collector import collector_off, collector_off_in_imports
from sat_train.config import RunConfig, load_run_config, split_command_line
from sat_train.distributed.environment import RankEnv, tell_torchrun
from sat_train.distributed.signals import StopRequest
from sat_train.errors import SatTrainError, Stopped
from sat_train.log import configure_logging

if TYPE_CHECKING:
    from sat_train.distributed.failures import FailureBoard
    from sat_train.distributed.processes import ProcessMesh

Command = Literal["train", "sample", "precompute"]

_INTERRUPTED = 130
_MEET_TO_REPORT_S = 30  # longest time that a failed rank looks for the others


def train(words: Sequence[str] | None = None) -> int:
    """Trains a model; returns the exit code. Without `words`, those of this process."""
    return run_on_ranks("train", ("sat_train.cli.train_videos", "train"), words)


def sample(words: Sequence[str] | None = None) -> int:
    """Samples videos; returns the exit code. Without `words`, those of this process."""
    return run_on_ranks("sample", ("sat_train.cli.sample_videos", "sample"), words)


def precompute(words: Sequence[str] | None = None) -> int:
    """Encodes a run's samples into `data.cache_dir`; returns the exit code."""
    return run_on_ranks("precompute", ("sat_train.encoding.precompute", "precompute_until_stopped"), words)


def run_on_ranks(command: Command, work: tuple[str, str], words: Sequence[str] | None) -> int:
    """Reads the configuration, joins the ranks and does the work.

    Args:
        command: The command, for which the configuration is checked.
        work: Module and function (config, mesh) -> None. Imported after the configuration has been checked,
            because torch and the libraries above it take seconds.
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code: 0 if the work is complete or was stopped in order, 2 for faults of the command line,
        configuration, data or weights, 1 for a failure of the work.
    """
    words = sys.argv[1:] if words is None else words
    if wants_help(words):
        print_usage(command)
        return 0
    try:
        StopRequest("stopped before the start").listen()  # until the work listens itself
        return _run_on_ranks(command, work, words)
    except Stopped as request:
        print(request, file=sys.stderr)
        return request.exit_code
    except KeyboardInterrupt:
        print("interrupted before the start", file=sys.stderr)
        return _INTERRUPTED


def _run_on_ranks(command: Command, work: tuple[str, str], words: Sequence[str]) -> int:
    try:
        env = RankEnv.read()
    except SatTrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    configure_logging(rank=env.rank)
    # a lost rank is reported here, without torch's C++ stacks
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.simplefilter("ignore", FutureWarning)  # deprecation notices are not for the user
    try:
        base, rest = split_command_line(words)
        config = load_run_config(base, rest, purpose=command)
    except BaseException as error:
        return _end(env, partial(_report_before_meeting, error, env))
    return _join_and_work(config, env, work)


def _join_and_work(config: RunConfig, env: RankEnv, work: tuple[str, str]) -> int:
    with collector_off():
        from sat_train.distributed.failures import FailureBoard
        from sat_train.distributed.meeting import meet
        from sat_train.distributed.processes import start_processes, stop_processes

    board: FailureBoard | None = None
    try:
        timeout = timedelta(minutes=config.args.distributed_timeout_minutes)
        store = meet(env, timeout)
        board = FailureBoard(store, env, timeout)
        board.watch()
        mesh = start_processes(
            env,
            device=config.args.device,
            backend=config.args.distributed_backend,
            model_parallel_size=config.args.model_parallel_size,
            timeout_minutes=config.args.distributed_timeout_minutes,
            store=store,
        )
        module, name = work  # imported after the start, which chooses DeepSpeed's accelerator
        with collector_off_in_imports():
            do: Callable[[RunConfig, ProcessMesh], None] = getattr(import_module(module), name)
        do(config, mesh)
        board.close()
    except BaseException as error:
        return _end(env, partial(_report, error, env, board))
    stop_processes()
    return 0


def _end(env: RankEnv, report: Callable[[], int]) -> int:
    """Reports a failure and exits, without waiting for the clean-up of libraries."""
    if env.world_size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by the launcher once another rank has ended
    try:
        code = report()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    if env.world_size > 1:
        os._exit(code)  # destructors of the process group would wait for the other ranks
    return code


def _report_before_meeting(error: BaseException, env: RankEnv) -> int:
    """Reports a failure before the start to the other ranks; a single process needs no torch for that."""
    if env.world_size == 1:
        return _report(error, env, None)
    from sat_train.distributed.failures import FailureBoard
    from sat_train.distributed.meeting import meet

    timeout = timedelta(seconds=_MEET_TO_REPORT_S)
    try:
        board = FailureBoard(meet(env, timeout), env, timeout)
    except SatTrainError:
        board = None
    return _report(error, env, board)


def _report(error: BaseException, env: RankEnv, board: FailureBoard | None) -> int:
    """Shows the first failure of all ranks as the last output; returns the exit code of all ranks."""
    error = _find_stop(error) or error
    code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    if board is not None and env.world_size > 1:
        agreed = getattr(error, "ranks_agree", False)
        return board.report(_describe(error, board), code, agreed=agreed).exit_code
    message = _describe(error, None)
    message = message if env.world_size == 1 else f"rank {env.rank}: {message}"
    print(message, file=sys.stderr)
    tell_torchrun(message, int(time.time()))
    return code


def _find_stop(error: BaseException) -> BaseException | None:
    """Returns the stop request behind an error, in which libraries may have wrapped it."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, Stopped | KeyboardInterrupt):
        inner = inner.__cause__ or inner.__context__
    return inner


def _describe(error: BaseException, board: FailureBoard | None) -> str:
    """Returns the text to show: a lost rank by its number, a bug of this project with its traceback."""
    if isinstance(error, SatTrainError | Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, RuntimeError) and board is not None and (loss := board.describe_loss()):
        return f"{loss}\n  noticed by: {type(error).__name__}: {str(error).splitlines()[0]}"
    return "".join(traceback.format_exception(error)).rstrip()
