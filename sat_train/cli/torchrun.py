"""Runs torchrun without its traceback, so that a rank's message is the last text on the screen.

python -m sat_train.cli.torchrun <words of torchrun> launch/train_video.py --base ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sat_train.errors import printable


def main(words: Sequence[str] | None = None) -> int:
    """Runs torchrun.

    Returns:
        Exit code of the rank that failed first, 128 and the number of the signal that ended it or torchrun,
        or 0.
    """
    try:
        torchrun.main(words)
    except ChildFailedError as error:
        return _show(*error.get_first_failure())
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _show(rank: int, failure: ProcessFailure) -> int:
    """Shows the message that the rank left for torchrun, or the signal that ended it."""
    signal_name = failure.signal_name() if failure.exitcode < 0 else ""
    message = f"rank {rank} was ended by {signal_name}" if signal_name else str(failure.message)
    print(printable(message), file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
