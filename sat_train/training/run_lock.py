"""Ownership of a run directory by an active run: a file lock where supported, and always a heartbeat."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import threading
import time
from pathlib import Path

from sat_train.errors import LaunchError
from sat_train.files import write_text
from sat_train.log import get_logger

log = get_logger(__name__)

LOCK = "run.lock"

_HEARTBEAT_S = 5.0
_WATCH_S = 4 * _HEARTBEAT_S
_MOST_BYTES = 4096
# Lustre without `-o flock`, NFS without a lock daemon, FUSE
_NO_FILE_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class RunLock:
    """Lock of an active run, held by rank 0: a file lock, and a heartbeat for machines without shared locks.

    Args:
        run_directory: The run directory.
        watch_s: Seconds to watch another run's heartbeat where the file system has no file locks.

    Raises:
        OSError: The folder cannot be written.
        BlockingIOError: An active run holds it.
        LaunchError: `run.lock` is not an ordinary file.
    """

    def __init__(self, run_directory: Path, *, watch_s: float = _WATCH_S) -> None:
        self._path = run_directory / LOCK
        self._token = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._descriptor = _take(self._path, self._token, watch_s)
        self._released = threading.Event()
        self._beats = 0
        os.ftruncate(self._descriptor, 0)
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Releases the lock at the end of the run.

        Never raises: it is called when a run fails, and must not hide the reason. A leftover lock is taken
        over.
        """
        self._released.set()
        self._thread.join()  # it must not write to a closed descriptor
        try:
            if _is_at(self._descriptor, self._path):
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays: %s", self._path, error.strerror)
        os.close(self._descriptor)

    def check_held(self) -> None:
        """Checks that the folder still belongs to this run.

        Raises:
            LaunchError: Another run has taken it over, as it may when this one was suspended for long.
        """
        if os.path.lexists(self._path) and not _is_at(self._descriptor, self._path):
            raise LaunchError(
                f"{self._path.parent} belongs to another run by now; nothing more is written to it",
                expected="one run at a time in a run directory",
                remedy="decide which of the two runs is to continue",
            )

    def _keep_beating(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            try:
                self._beat()
            except OSError as error:  # a full disk: saving will report it; the file lock still holds
                log.debug("%s: %s", self._path, error)

    def _beat(self) -> None:
        """Writes the heartbeat in place, always of the same length, so that a reader sees a whole line."""
        self._beats += 1
        os.pwrite(self._descriptor, f"{self._token} {self._beats:012d}\n".encode(), 0)


def is_alive(run_directory: Path, *, watch_s: float = _WATCH_S) -> bool:
    """Returns whether an active run writes to a folder.

    On this machine the file lock answers at once. A run of another machine may not share file locks with this
    one, and some file systems have none, so the heartbeat is watched.

    Args:
        watch_s: Seconds to watch the heartbeat.

    Raises:
        LaunchError: `run.lock` is not an ordinary file.
    """
    path = run_directory / LOCK
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        has_locks = _lock(descriptor, fcntl.LOCK_SH)
        before = os.read(descriptor, _MOST_BYTES)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    if has_locks and before.startswith(f"{socket.gethostname()} ".encode()):
        return False
    log.info("watching the heartbeat of %s for %.0f s", path, watch_s)
    return _beats(path, before, watch_s)


def _take(path: Path, token: str, watch_s: float) -> int:
    """Opens and claims `run.lock`, and returns its descriptor."""
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            has_locks = _lock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            raise
        if has_locks and _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # with locks: the file may be one that another run has just released and deleted
        if not has_locks:
            return _take_by_heartbeat(path, token, watch_s)


def _take_by_heartbeat(path: Path, token: str, watch_s: float) -> int:
    """Claims a lock file without file locks: no heartbeat changes it, and no other run claims it meanwhile.

    Of several runs that start at once the last one to write wins.
    """
    log.warning("%s: this file system has no file locks; the heartbeat alone protects the run", path)
    before = _read(path)
    if before and _beats(path, before, watch_s):
        raise BlockingIOError(errno.EAGAIN, "an active run writes its heartbeat", str(path))
    write_text(path, token)
    time.sleep(watch_s / 4)
    descriptor = _open(path, os.O_RDWR)
    if os.pread(descriptor, _MOST_BYTES, 0) != token.encode():
        os.close(descriptor)
        raise BlockingIOError(errno.EAGAIN, "another run claimed it at the same time", str(path))
    return descriptor


def _beats(path: Path, before: bytes, watch_s: float) -> bool:
    time.sleep(watch_s)
    return _read(path) not in (b"", before)


def _read(path: Path) -> bytes:
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Locks a file without waiting; returns whether the file system has locks at all."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_FILE_LOCKS:
            return False
        raise
    return True


def _open(path: Path, flags: int) -> int:
    """Opens `run.lock` itself: follows no link, never blocks, accepts only an ordinary file."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise _odd_lock(path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise _odd_lock(path)
    return descriptor


def _odd_lock(path: Path) -> LaunchError:
    return LaunchError(
        f"{path} is a link, a folder, a device or a pipe",
        expected="an ordinary file, which an active run holds",
        remedy="find out where it comes from, and remove it",
    )


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False
