"""Keeps one line of history per run directory: its largest step is the one committed last.

Everything that needs "the newest step" (`latest`, `args.resume`, sampling, conversion, retention) can
therefore take the largest number. Going back to an earlier step renames the later ones, so that they no
longer count as steps.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from sat_train.checkpoint.layout import (
    ABANDONED_SUFFIX,
    BEST,
    LATEST,
    committed_steps,
    parse_step,
    step_folder,
)
from sat_train.files import read_text, sync_folder, write_text
from sat_train.log import get_logger

log = get_logger(__name__)

_POINTER_BYTES = 1000


def rewind(run_directory: Path, step: int) -> list[int]:
    """Makes a committed step the newest of its run; later ones are set aside, newest first.

    A kill in between leaves a valid, shorter history.

    Returns:
        The steps that were set aside.

    Raises:
        CheckpointError: The folder cannot be read.
        OSError: A step cannot be renamed. The run must then not continue: it would mix two histories.

    Ranks: one, which owns the folder.
    """
    steps = [other for other in committed_steps(run_directory) if other > step]
    if (best := read_best(run_directory)) is not None and best > step:
        (run_directory / BEST).unlink()
    for later, newest in itertools.pairwise([*steps, step]):
        point_latest(run_directory, newest)
        target = set_aside(step_folder(run_directory, later), ABANDONED_SUFFIX)
        log.warning("going back to step %d: step %d is set aside as %s", step, later, target)
    if read_latest(run_directory) != step:
        point_latest(run_directory, step)
    return steps


def set_aside(folder: Path, suffix: str) -> Path:
    """Renames a step's folder to `<step><suffix>`, or `<step><suffix>.N` if that is taken.

    Raises:
        OSError: It cannot be renamed.
    """
    target, number = folder.with_name(folder.name + suffix), 0
    while os.path.lexists(target):
        number += 1
        target = folder.with_name(f"{folder.name}{suffix}.{number}")
    os.rename(folder, target)
    sync_folder(folder.parent)
    return target


def point_latest(run_directory: Path, step: int) -> None:
    """Writes the file `latest`, for SAT and for people.

    Raises:
        OSError: It cannot be written.
    """
    write_text(run_directory / LATEST, str(step))


def read_latest(run_directory: Path) -> int | None:
    """Returns the step that `latest` names, or None if the file is missing or names no step."""
    return _read_pointer(run_directory / LATEST)


def point_best(run_directory: Path, step: int | None) -> None:
    """Writes the file `best`, or removes it where no step is the best.

    Raises:
        OSError: It cannot be written.
    """
    if step is None:
        (run_directory / BEST).unlink(missing_ok=True)
    elif read_best(run_directory) != step:
        write_text(run_directory / BEST, str(step))


def read_best(run_directory: Path) -> int | None:
    """Returns the step that `best` names, or None if the file is missing or names no step."""
    return _read_pointer(run_directory / BEST)


def follow_best(path: Path) -> Path:
    """Returns the step folder that `<run>/best` names; any other path unchanged."""
    step = read_best(path.parent) if path.name == BEST and path.is_file() else None
    return path if step is None else step_folder(path.parent, step)


def _read_pointer(path: Path) -> int | None:
    try:
        return parse_step(read_text(path, limit=_POINTER_BYTES).strip())
    except (OSError, ValueError):
        return None
