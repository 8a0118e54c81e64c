"""Rank-aware logging: rank 0 logs everything, the others only warnings, with their rank in each line."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from sat_train.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

_ROOT = "sat_train"
_console: Console | None = None


class PrintableFormatter(logging.Formatter):
    """Formats records so that text from a stranger's file cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """Writes whole lines to standard error, above the progress bar once there is a console."""

    def emit(self, record: logging.LogRecord) -> None:
        if _console is None:
            super().emit(record)
            return
        from rich.text import Text

        try:
            # not a string with `markup=False`: the bar below is rendered with the options of the line
            _console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:
            self.handleError(record)


def console() -> Console:
    """Returns the one console of this process, on standard error, which bars and log lines share.

    With two independent writers a log line would follow a bar on the same line.
    """
    global _console
    if _console is None:
        from rich.console import Console  # here, because most commands show no bar

        _console = Console(file=sys.stderr)
    return _console


def get_logger(name: str) -> logging.Logger:
    """Returns the logger of a module; call it with `__name__`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging(*, rank: int = 0) -> None:
    """Sends this package's records to standard error.

    Args:
        rank: Global rank of this process. Ranks above 0 show warnings and errors only.
    """
    handler = _ConsoleHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(PrintableFormatter(f"%(asctime)s {prefix}%(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
