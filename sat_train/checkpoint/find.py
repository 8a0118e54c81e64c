"""Finds the checkpoint that a run resumes from."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sat_train.checkpoint.history import follow_best, set_aside
from sat_train.checkpoint.layout import (
    CORRUPT_SUFFIX,
    cannot_read,
    committed_steps,
    is_committed,
    parse_step,
    step_folder,
)
from sat_train.checkpoint.manifest import DamagedCheckpoint, Manifest, read_manifest, verify_checkpoint
from sat_train.errors import CheckpointError
from sat_train.log import get_logger

log = get_logger(__name__)

IsAlive = Callable[[Path], bool]


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint whose every byte has been verified.

    Args:
        run_directory: Directory of the run that is resumed.
        step: The step it resumes from.
        manifest: Its manifest.
        steps: All committed steps of the run, newest first, after damaged ones were set aside.
    """

    run_directory: Path
    step: int
    manifest: Manifest
    steps: tuple[int, ...]


def find_resume_point(
    mode: str, *, save_root: Path, experiment_name: str, is_alive: IsAlive
) -> ResumePoint | None:
    """Finds the checkpoint that `args.resume` names.

    Args:
        mode: `auto`: the newest run of this name that holds a complete checkpoint and that no other process
            writes to, else None. `must`: the same, but an error if there is none. `none`: None. Anything
            else is the path of a run directory, of one step inside it, or of its `best`.
        save_root: `args.save`.
        experiment_name: `args.experiment_name`.
        is_alive: Whether another process is writing to a run directory.

    Raises:
        CheckpointError: `must` found nothing, or the path holds no complete checkpoint or is in use.

    Ranks: one, which sends the result to the others (`collectives.on_rank_0`).
    """
    if mode == "none":
        return None
    if mode not in ("auto", "must"):
        return _find_at(Path(mode).expanduser(), is_alive)
    point = find_resumable(save_root, experiment_name, is_alive=is_alive)
    if point is None and mode == "must":
        raise CheckpointError(
            f"args.resume = must: {save_root} holds no complete checkpoint of a stopped '{experiment_name}'",
            expected=f"a folder {experiment_name}-<YYYYmmdd-HHMMSS> with a committed step",
            remedy="check args.save and args.experiment_name, or set args.resume=auto to start a new run",
        )
    return point


def find_resumable(save_root: Path, experiment_name: str, *, is_alive: IsAlive) -> ResumePoint | None:
    """Returns the newest verified checkpoint of the newest stopped run of that name, or None."""
    for run_directory in run_directories(save_root, experiment_name):
        if is_alive(run_directory):
            log.info("%s is in use by another process; trying an older run", run_directory)
            continue
        point = newest_verified(run_directory)
        if point is not None:
            return point
    return None


def run_directories(save_root: Path, experiment_name: str) -> list[Path]:
    """Returns the folders `<experiment_name>-<YYYYmmdd-HHMMSS>`, newest first."""
    pattern = re.compile(re.escape(experiment_name) + r"-\d{8}-\d{6}")
    try:
        with os.scandir(save_root) as entries:
            names = [entry.name for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise cannot_read(save_root, error) from error
    return [save_root / name for name in sorted(names, reverse=True)]


def newest_verified(run_directory: Path) -> ResumePoint | None:
    """Returns the newest checkpoint of a run that verifies, or None.

    Damaged checkpoints are renamed to `<step>.corrupt`.

    Raises:
        CheckpointError: A checkpoint cannot be read. It may be whole, and resuming from an older one would
            abandon it.
    """
    for step in committed_steps(run_directory):
        try:
            return _verified(run_directory, step)
        except DamagedCheckpoint as error:
            log.warning("%s\n  using the checkpoint before it", error)
            _set_aside_damaged(step_folder(run_directory, step))
    return None


def _verified(run_directory: Path, step: int) -> ResumePoint:
    steps = tuple(committed_steps(run_directory))  # before the long read: another run may start meanwhile
    return ResumePoint(run_directory, step, verify_checkpoint(step_folder(run_directory, step)), steps)


def _set_aside_damaged(folder: Path) -> None:
    try:
        set_aside(folder, CORRUPT_SUFFIX)
    except OSError as error:
        log.warning("%s could not be renamed: %s", folder, error.strerror)


def _find_at(path: Path, is_alive: IsAlive) -> ResumePoint:
    path = follow_best(path)
    _check_folder(path)
    is_step = is_committed(path) or (parse_step(path.name) is not None and not committed_steps(path))
    run_directory = path.parent if is_step else path
    if is_alive(run_directory):
        raise CheckpointError(
            f"args.resume = {path}: another process is writing to {run_directory}",
            remedy="stop it first",
        )
    if is_step:
        return _find_step(path)
    point = newest_verified(run_directory)
    if point is None:
        raise CheckpointError(
            f"args.resume = {path}: no complete checkpoint inside",
            expected="a run directory with a committed step",
            remedy="to start from weights alone, use args.load",
        )
    return point


def _find_step(path: Path) -> ResumePoint:
    if parse_step(path.name) is None:
        step = read_manifest(path).step
        raise CheckpointError(
            f"args.resume = {path}: this step has been set aside",
            expected=f"a step of the run, under its number: {path.parent / str(step)}",
            remedy=f"rename it to {step}, if that name is free, and resume from there",
        )
    return _verified(path.parent, int(path.name))


def _check_folder(path: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        is_folder = False
    except OSError as error:
        raise CheckpointError(
            f"args.resume = {str(path)[:200]} cannot be read: {error.strerror}", remedy="check the path"
        ) from error
    if not is_folder:
        raise CheckpointError(
            f"args.resume = {path}: no such folder",
            expected="auto, must, none, a run directory, or a step inside a run directory",
        )
