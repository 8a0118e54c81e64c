"""`launch/train_video.py` and `sat-train train`: from the command line to an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sat_train.config import RunConfig, load_run_config, split_command_line
from sat_train.distributed.environment import RankEnv
from sat_train.errors import SatTrainError
from sat_train.log import configure_logging

if TYPE_CHECKING:
    from sat_train.distributed.failures import FailureBoard

_INTERRUPTED = 130


def main(words: Sequence[str] | None = None) -> int:
    """Trains.

    Args:
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code: 0 when the run is complete or was stopped in order, 2 for what is wrong with the command
        line, configuration, data or weights, 1 for what went wrong in training.
    """
    rank = 0
    try:
        env = RankEnv.read()
        rank = env.rank
        configure_logging(rank=rank)
        base, rest = split_command_line(sys.argv[1:] if words is None else words)
        run = load_run_config(base, rest, purpose="train")
    except SatTrainError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return error.exit_code
    return _train(run, env)


def _train(run: RunConfig, env: RankEnv) -> int:
    # torch and all that stands on it, once the configuration is known to be right
    from sat_train.distributed.failures import FailureBoard
    from sat_train.distributed.processes import start_processes, stop_processes
    from sat_train.training.build import train

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
        train(run, grid)
    except BaseException as error:
        return _fail(error, env, board)
    board.close()
    stop_processes()
    return 0


def _fail(error: BaseException, env: RankEnv, board: FailureBoard | None) -> int:
    """Shows the first error of all ranks, last, and leaves without waiting for the others."""
    from sat_train.distributed.failures import report_to_torchrun

    code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    if isinstance(error, SatTrainError):
        message = str(error)
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
    if env.world_size > 1:
        os._exit(code)  # destructors of the process group would wait for the other ranks
    return code
