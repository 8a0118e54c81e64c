"""The folder of a run: named once, writable, and owned by one living run."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO

from sat_train.checkpoint.history import set_aside
from sat_train.checkpoint.layout import ABANDONED_SUFFIX
from sat_train.distributed.collectives import broadcast_object, check_all_ranks
from sat_train.distributed.environment import tell_batch_script
from sat_train.distributed.processes import ProcessGrid
from sat_train.errors import LaunchError, SatTrainError
from sat_train.log import get_logger

log = get_logger(__name__)

LOCK = "run.lock"
PREEMPTED = "PREEMPTED"
SAMPLES = "samples"

_HEARTBEAT_S = 5.0
_WATCH_S = 4 * _HEARTBEAT_S


class RunLock:
    """Held by rank 0 of a living run: a file lock, and a heartbeat for machines that do not share file locks.

    Raises:
        OSError: The folder cannot be written.
        BlockingIOError: A living run of this machine, or of one that shares its file locks, holds it.
    """

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / LOCK
        self._file: IO[str] = open(self._path, "a+")  # noqa: SIM115  held as long as the run lives
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise
        self._released = threading.Event()
        self._beats = 0
        self._beat()
        threading.Thread(target=self._keep_beating, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Says that the run has ended in order."""
        self._released.set()
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _keep_beating(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            try:
                self._beat()
            except OSError as error:  # a full disk: saving will say so; the file lock still holds
                log.debug("%s: %s", self._path, error)

    def _beat(self) -> None:
        self._beats += 1
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{socket.gethostname()} {os.getpid()} {self._beats}\n")
        self._file.flush()


def is_alive(run_folder: Path, *, watch_s: float = _WATCH_S) -> bool:
    """Says whether a living run writes to a folder.

    On this machine the file lock tells at once. A run of another machine may not share file locks with this
    one, so its heartbeat is watched.

    Args:
        watch_s: Seconds to watch the heartbeat of another machine.
    """
    path = run_folder / LOCK
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            before = file.read()
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    if before.startswith(socket.gethostname() + " "):
        return False
    log.info("%s was last held on another machine; watching its heartbeat for %.0f s", path, watch_s)
    time.sleep(watch_s)
    return path.exists() and path.read_text() != before


def open_run_folder(
    grid: ProcessGrid, *, save_root: Path, experiment_name: str, resumed: Callable[[], Path | None]
) -> tuple[Path, RunLock | None]:
    """Gives the run its folder: the one it goes on in, or a new `<experiment_name>-<YYYYmmdd-HHMMSS>`.

    Args:
        save_root: `args.save`.
        experiment_name: `args.experiment_name`.
        resumed: Finds the folder of the run that goes on; asked on rank 0, again when another run was faster.

    Returns:
        The folder, and on rank 0 the lock that keeps others out of it.

    Raises:
        SatTrainError: On all ranks alike: it cannot be written, or is not seen by all machines.

    Ranks: all.
    """
    error: SatTrainError | None = None
    folder, lock = None, None
    if grid.rank == 0:
        try:
            folder, lock = _open_on_rank_0(save_root, experiment_name, resumed)
            tell_batch_script(folder)
        except OSError as problem:
            error = _cannot_write(save_root, problem)
        except SatTrainError as problem:
            error = problem
    check_all_ranks(grid, error)
    shared = broadcast_object(grid, folder)
    check_all_ranks(grid, None if shared.is_dir() else _not_shared(shared))
    return shared, lock


def _open_on_rank_0(
    save_root: Path, experiment_name: str, resumed: Callable[[], Path | None]
) -> tuple[Path, RunLock]:
    while (folder := resumed()) is not None:
        try:
            return folder, RunLock(folder)
        except BlockingIOError:
            log.info("another run has just taken %s", folder)
    folder = _new_folder(save_root, experiment_name)
    return folder, RunLock(folder)


def _new_folder(save_root: Path, experiment_name: str) -> Path:
    save_root.mkdir(parents=True, exist_ok=True)
    while True:
        folder = save_root / f"{experiment_name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)  # the name has whole seconds: the next one is free soon


def _cannot_write(save_root: Path, problem: OSError) -> LaunchError:
    return LaunchError(
        f"args.save = {save_root}: {problem.strerror or problem} ({problem.filename or save_root})",
        expected="a folder that this user may write, on a disk with room",
        remedy="set args.save to such a folder",
    )


def _not_shared(folder: Path) -> LaunchError:
    return LaunchError(
        f"{folder}, made by rank 0, is not seen on {socket.gethostname()}",
        expected="args.save on a file system that all machines share",
    )


def set_samples_aside(run_folder: Path, step: int) -> None:
    """Renames the validation videos of steps after the one that a person went back to.

    Raises:
        OSError: They cannot be renamed.
    """
    for path in sorted((run_folder / SAMPLES).glob("*")):
        if path.name.isascii() and path.name.isdecimal() and int(path.name) > step:
            set_aside(path, ABANDONED_SUFFIX)
