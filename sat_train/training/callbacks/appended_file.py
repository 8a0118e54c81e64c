"""A file of appended records, on a disk that may be full for a while."""

from __future__ import annotations

import os
from pathlib import Path

# Limit of the pending records: a run that reports to a full disk for weeks must not fill its memory.
_MOST_WAITING_BYTES = 64 * 2**20

_APPENDED = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class AppendedFile:
    """Appends records; those that could not be written are kept and written, in order, with the next one.

    Args:
        path: The file; it is created when needed, and a link at its path is not followed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""

    def append(self, record: bytes) -> None:
        """Appends a record, whole or not at all.

        Raises:
            OSError: It could not be written; it stays pending.
        """
        self.add(record)
        self.write()

    def add(self, record: bytes) -> None:
        """Queues a record for the next `write`, or drops it where too much is pending already."""
        if len(self._waiting) + len(record) <= _MOST_WAITING_BYTES:
            self._waiting += record

    def write(self) -> None:
        """Appends all pending records or none.

        Raises:
            OSError: It could not be written; it stays pending.
        """
        descriptor = os.open(self._path, _APPENDED, 0o644)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                _write_all(descriptor, self._waiting)
            except OSError:
                os.ftruncate(descriptor, end)  # frees space: it works on a full disk
                raise
        finally:
            os.close(descriptor)
        self._waiting = b""


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
