"""Rank-aware logging: rank 0 speaks, the others only warn, and each of their lines names its rank."""

from __future__ import annotations

import logging
import sys

from sat_train.errors import printable

_ROOT = "sat_train"


class PrintableFormatter(logging.Formatter):
    """Formats records; what a stranger's file put into them cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Returns the logger of a module; call it with `__name__`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Sends this package's records to standard error.

    Args:
        rank: Global rank of this process. Ranks above 0 show warnings and errors only.
        level: Level of rank 0.
    """
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(PrintableFormatter(f"%(asctime)s {prefix}%(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))
    root.propagate = False
