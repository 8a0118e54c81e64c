"""What the commands that run on several ranks share: from the command line to an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from sat_train.config import RunConfig, load_run_config, split_command_line
from sat_train.distributed.environment import RankEnv
from sat_train.errors import SatTrainError, Stopped
from sat_train.log import configure_logging

if TYPE_CHECKING:
    from sat_train.distributed.failures import FailureBoard
    from sat_train.distributed.processes import ProcessGrid

_INTERRUPTED = 130
_HEAD_START_S = 3  # nobody waits for it where rank 0 ends, as the launcher then ends the others


def run_on_ranks(
    purpose: Literal["train", "sample", "precompute"], work: tuple[str, str], words: Sequence[str] | None
) -> int:
    """Reads the configuration, joins the ranks and does the work.

    Args:
        purpose: What the configuration is checked for.
        work: Module and function (run, grid) -> None. Imported once the configuration is known to be right,
            because torch and all that stands on it take seconds.
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code: 0 when the work is complete or was stopped in order, 2 for what is wrong with the command
        line, configuration, data or weights, 1 for what went wrong in the work.
    """
    try:
        return _run_on_ranks(purpose, work, words)
    except KeyboardInterrupt:  # while libraries are imported: afterwards `StopRequest` listens
        print("interrupted before the start", file=sys.stderr)
        return _INTERRUPTED


def _run_on_ranks(
    purpose: Literal["train", "sample", "precompute"], work: tuple[str, str], words: Sequence[str] | None
) -> int:
    rank = 0
    try:
        env = RankEnv.read()
        rank = env.rank
        configure_logging(rank=rank)
        warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other, not who trains
        base, rest = split_command_line(sys.argv[1:] if words is None else words)
        run = load_run_config(base, rest, purpose=purpose)
    except SatTrainError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        else:
            _let_rank_0_speak()
        return error.exit_code
    return _join_and_work(run, env, work)


def _join_and_work(run: RunConfig, env: RankEnv, work: tuple[str, str]) -> int:
    from sat_train.distributed.failures import FailureBoard
    from sat_train.distributed.processes import start_processes, stop_processes

    board: FailureBoard | None = None
    try:
        grid = start_processes(
            env,
            device=run.args.device,
            backend=run.args.distributed_backend,
            model_parallel_size=run.args.model_parallel_size,
            timeout_minutes=run.args.distributed_timeout_minutes,
        )
        board = FailureBoard(grid.store, grid.rank)
        board.watch()
        module, name = work  # imported after the start, which chooses DeepSpeed's accelerator
        do: Callable[[RunConfig, ProcessGrid], None] = getattr(import_module(module), name)
        do(run, grid)
    except BaseException as error:
        return _fail(error, env, board)
    board.close()
    stop_processes()
    return 0


def _let_rank_0_speak() -> None:
    """Lets rank 0 end first: when one rank has ended the launcher ends all, in mid-sentence if need be."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_HEAD_START_S)


def _fail(error: BaseException, env: RankEnv, board: FailureBoard | None) -> int:
    """Shows the first error of all ranks, last, and leaves without waiting for the others."""
    from sat_train.distributed.failures import report_to_torchrun

    code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    if isinstance(error, SatTrainError | Stopped):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    else:
        message = "".join(traceback.format_exception(error)).rstrip()
    if getattr(error, "ranks_agree", False):
        shown = message if env.rank == 0 else ""
    else:
        shown = board.first(message) if board is not None and env.world_size > 1 else message
    if shown:
        print(shown, file=sys.stderr)
    report_to_torchrun(shown or message)
    sys.stdout.flush()
    sys.stderr.flush()
    if not shown and env.rank != 0:
        _let_rank_0_speak()
    if env.world_size > 1:
        os._exit(code)  # destructors of the process group would wait for the other ranks
    return code
