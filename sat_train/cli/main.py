"""`sat-train`: dispatches to a command. The only place that turns an exception into an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from sat_train.errors import SatTrainError

# Command -> module with `main(argv) -> exit code`, or module:function. Imported on demand: most need torch.
COMMANDS = {
    "train": ("sat_train.cli.ranks:train", "train a model (with torchrun: launch/train_video.py)"),
    "sample": (
        "sat_train.cli.ranks:sample",
        "sample videos from prompts (with torchrun: launch/sample_video.py)",
    ),
    "precompute": ("sat_train.cli.ranks:precompute", "encode data into a cache (launch/precompute.py)"),
    "cache": ("sat_train.cli.cache", "list, verify or prune a cache of encoded samples"),
    "convert": (
        "sat_train.cli.convert",
        "convert weights of a run, of SAT or of diffusers to diffusers or SAT",
    ),
    "compare": (
        "sat_train.cli.compare",
        "compare the validation losses of a run with another run or with what is expected",
    ),
    "data": ("sat_train.cli.data", "inspect a data set, or preview samples as the model will see them"),
    "plan": ("sat_train.cli.plan", "compute memory, time, disk and GPU-hours of a run"),
    "new-extension": ("sat_train.cli.new_extension", "write the skeleton of an extension, with its test"),
    "check": ("sat_train.cli.check", "read a configuration, name every fault, show every value"),
}
_INTERRUPTED = 130


def run_cli(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code; errors of the user are printed without a traceback.

    Args:
        command: The command, which returns its exit code; None is 0.
    """
    # libraries' deprecation notices are not for the user
    warnings.simplefilter("ignore", FutureWarning)
    try:
        return command() or 0
    except SatTrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # `sat-train check ... | head`
        sys.stderr.close()
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command named by the first word.

    Args:
        argv: The words after `sat-train`; None takes them from the process.

    Returns:
        0 for success, 2 for faults that the user can correct before the run, 1 for a run that failed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"no command '{words[0]}'\n\n{_usage()}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[words[0]][0].partition(":")
    return run_cli(lambda: int(getattr(import_module(module), function or "main")(words[1:])))


def _usage() -> str:
    listed = "\n".join(f"  {word:<13} {what}" for word, (_, what) in COMMANDS.items())
    return f"usage: sat-train COMMAND ...\n\n{listed}\n\nsat-train COMMAND --help describes a command."


if __name__ == "__main__":
    sys.exit(main())
