"""Checks links in a folder: they are followed inside it, and out of it only if that is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sat_train.data.sources.records import SourceOptions, check_faults


def leads_out(path: Path, real_root: str) -> bool:
    """Returns whether a path leads out of a folder.

    Args:
        path: The file.
        real_root: The folder, its own links resolved.
    """
    real = os.path.realpath(path)
    return real != real_root and not real.startswith(real_root.rstrip("/") + "/")


def check_links(root: Path, paths: Iterable[Path], options: SourceOptions) -> None:
    """Refuses links that lead out of a folder, all of them at once.

    The folder itself may be a link: its name was given by the person.

    Raises:
        DataError: There are such links, and `data.follow_links` is off.
    """
    if options.follow_links:
        return
    real_root = os.path.realpath(root)
    refuse_links(root, [path for path in paths if leads_out(path, real_root)])


def refuse_links(root: Path, paths: Iterable[Path]) -> None:
    """Raises an error that names links and says how to follow them.

    Raises:
        DataError: There is one.
    """
    faults = [(str(path), f"leads to {os.path.realpath(path)}") for path in paths]
    check_faults(
        faults,
        f"{root}: {len(faults)} links lead out of this folder",
        expected="files below the folder that was given",
        remedy="if they are yours, data.follow_links=true reads them",
    )
