"""The folder of a run: named once, writable, and owned by one active run."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sat_train.checkpoint.find import ResumePoint
from sat_train.checkpoint.history import set_aside
from sat_train.checkpoint.layout import ABANDONED_SUFFIX, SAMPLES
from sat_train.distributed.collectives import check_all_ranks, on_rank_0
from sat_train.distributed.environment import tell_batch_script
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import LaunchError
from sat_train.log import get_logger
from sat_train.training.run_lock import RunLock

log = get_logger(__name__)


@dataclass(frozen=True)
class RunDirectory:
    """Output folder of a run and the checkpoint that it resumes.

    Args:
        folder: The run's folder; None for a run that saves nothing.
        lock: Keeps other runs out of it, on rank 0.
        point: The checkpoint that the run resumes; None for a new run.
    """

    folder: Path | None
    lock: RunLock | None
    point: ResumePoint | None


def claim_run_directory(
    mesh: ProcessMesh, *, save_root: Path, experiment_name: str, resumed: Callable[[], Path | None]
) -> tuple[Path, RunLock | None]:
    """Claims the folder of a run: the one it resumes, or a new `<experiment_name>-<YYYYmmdd-HHMMSS>`.

    Args:
        save_root: `args.save`.
        experiment_name: `args.experiment_name`.
        resumed: Finds the folder of the resumed run; called on rank 0, again when another run was faster.

    Returns:
        The folder, and on rank 0 the lock that keeps others out of it.

    Raises:
        SatTrainError: On all ranks alike: it cannot be written, or is not seen by all machines.

    Ranks: all.
    """
    locks: list[RunLock] = []  # stays on rank 0

    def claim() -> Path:
        try:
            folder, lock = _open_on_rank_0(save_root, experiment_name, resumed)
            tell_batch_script(folder)
        except OSError as problem:
            raise _cannot_write(save_root, problem) from problem
        locks.append(lock)
        return folder

    folder = on_rank_0(mesh, claim)
    check_all_ranks(mesh, None if folder.is_dir() else _not_shared(folder))
    return folder, locks[0] if locks else None


def _open_on_rank_0(
    save_root: Path, experiment_name: str, resumed: Callable[[], Path | None]
) -> tuple[Path, RunLock]:
    while (folder := resumed()) is not None:
        check_own_entries(folder)
        try:
            return folder, RunLock(folder)
        except BlockingIOError:
            log.info("another run has just claimed %s", folder)
    folder = _new_folder(save_root, experiment_name)
    return folder, RunLock(folder)


def check_own_entries(run_directory: Path) -> None:
    """Checks that all files of a run are inside its folder, which may be untrusted.

    Raises:
        LaunchError: A link leads out of it, or there is a pipe or a device; the message names it.
    """
    inside = os.path.realpath(run_directory)
    for folder, folders, files in os.walk(run_directory):
        for path in (os.path.join(folder, name) for name in folders + files):
            if os.path.islink(path):
                wrong = not os.path.realpath(path).startswith(inside + os.sep)
                what = "a link that leads out of the run directory"
            else:
                mode = os.lstat(path).st_mode
                wrong, what = not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)), "a pipe, socket or device"
            if wrong:
                raise LaunchError(
                    f"{path} is {what}",
                    expected="a run directory whose files are its own, for a resumed run writes to them",
                    remedy="replace it by a file of its own, or remove it",
                )


def _new_folder(save_root: Path, experiment_name: str) -> Path:
    save_root.mkdir(parents=True, exist_ok=True)
    while True:
        folder = save_root / f"{experiment_name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)  # names have whole seconds: the next one is free soon


def _cannot_write(save_root: Path, problem: OSError) -> LaunchError:
    return LaunchError(
        f"args.save = {save_root}: {problem.strerror or problem} ({problem.filename or save_root})",
        expected="a folder that this user may write, on a disk with room",
        remedy="set args.save to such a folder",
    )


def _not_shared(folder: Path) -> LaunchError:
    return LaunchError(
        f"{folder}, made by rank 0, is not visible on {socket.gethostname()}",
        expected="args.save on a file system that all machines share",
    )


def set_samples_aside(run_directory: Path, step: int) -> None:
    """Renames the validation videos of steps after the one that is resumed.

    Raises:
        OSError: They cannot be renamed.
    """
    for path in sorted((run_directory / SAMPLES).glob("*")):
        if path.name.isascii() and path.name.isdecimal() and int(path.name) > step:
            set_aside(path, ABANDONED_SUFFIX)
