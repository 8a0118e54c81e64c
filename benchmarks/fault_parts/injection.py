"""Faults that no outside hand can make: a disk that fails, a callback that raises."""

from __future__ import annotations

import builtins
import errno
import fnmatch
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Injection(Protocol):
    """Something that goes wrong inside a rank process."""

    def install(self) -> None:
        """Makes it so in this process. Called before anything else."""


@dataclass(frozen=True)
class FailingDisk:
    """From the moment that `trigger` exists, calls on matching paths fail.

    Args:
        trigger: A file that the one who injects creates.
        pattern: Which paths, with wildcards.
        error: Number of the error, e.g. `errno.EIO`.
        writes_only: Reading goes on working, as on a disk that became read-only.
    """

    trigger: str
    pattern: str
    error: int
    writes_only: bool

    def install(self) -> None:
        """Puts itself in front of the calls that open, rename and make files."""
        real_open, real_os_open = builtins.open, os.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            self._check(file, writes=any(letter in mode for letter in "wax+"))
            return real_open(file, mode, *args, **kwargs)

        def os_opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            self._check(path, writes=bool(flags & _WRITING))
            return real_os_open(path, flags, *args, **kwargs)

        builtins.open = io.open = opened
        os.open = os_opened
        for name in ("rename", "replace", "mkdir", "unlink"):
            setattr(os, name, self._guarded(getattr(os, name)))

    def _guarded(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            self._check(path, writes=True)
            return real(path, *args, **kwargs)

        return call

    def _check(self, path: Any, *, writes: bool) -> None:
        if not isinstance(path, (str, os.PathLike)) or (self.writes_only and not writes):
            return
        if fnmatch.fnmatch(str(path), self.pattern) and os.path.exists(self.trigger):
            raise OSError(self.error, os.strerror(self.error), str(path))


def read_only(trigger: Path, folder: Path) -> FailingDisk:
    """A disk that becomes read-only."""
    return FailingDisk(str(trigger), f"{folder}*", errno.EROFS, writes_only=True)


def unreadable(trigger: Path, pattern: str) -> FailingDisk:
    """Files that can neither be read nor written any more."""
    return FailingDisk(str(trigger), pattern, errno.EIO, writes_only=False)


@dataclass(frozen=True)
class RaisingCallback:
    """A callback whose method raises at one of its calls and ever after.

    Args:
        module: Module of `sat_train.training.callbacks`.
        name: Class.
        method: Method of the class.
        at_call: How many calls go well.
    """

    module: str
    name: str
    method: str
    at_call: int

    def install(self) -> None:
        """Replaces the method."""
        owner = getattr(import_module(f"sat_train.training.callbacks.{self.module}"), self.name)
        real, calls = getattr(owner, self.method), [0]

        def method(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > self.at_call:
                raise RuntimeError(f"injected into {self.name}.{self.method}")
            return real(*args, **kwargs)

        setattr(owner, self.method, method)
