"""Presents a part of a file as a file: keeps the position, while subclasses read."""

from __future__ import annotations

import io
from types import TracebackType
from typing import Protocol


class ReadableFile(Protocol):
    """The interface of a file that is open for binary reading."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def close(self) -> None: ...
    def __enter__(self) -> ReadableFile: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class PartReader(io.RawIOBase):
    """Keeps the position; subclasses implement `read`.

    Args:
        size: Size of the part in bytes.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def _left(self, size: int) -> int:
        """Returns the number of bytes that a call of `read` returns."""
        left = max(0, self._size - self._at)
        return left if size < 0 else min(size, left)
