"""Paths of configurations, in the working directory or in the package, and of shipped assets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sat_train.config.values import map_texts
from sat_train.patterns import expand_braces

PACKAGE = Path(__file__).resolve().parents[1]
ASSETS = PACKAGE / "assets"
_PREFIX = "asset:"
_PLACEHOLDER = re.compile(r"\{.+\}")


def find_config(path: str | Path) -> Path | None:
    """Returns the file of a configuration: from the working directory, else from those in the package.

    Args:
        path: As typed, e.g. `configs/sft.yaml`.
    """
    return next((candidate for candidate in (Path(path), PACKAGE / path) if exists(candidate)), None)


def exists(path: str | Path) -> bool:
    """Returns whether a path exists; one that no file system accepts (too long, NUL) does not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def expand_assets(value: Any) -> Any:
    """Replaces `asset:name` by the path of the shipped file, in all texts of a tree."""
    return map_texts(value, lambda text: re.sub(f"^{_PREFIX}", lambda _: f"{ASSETS}/", text))


def shorten_assets(value: Any) -> Any:
    """Undoes `expand_assets`, so that written paths are the same on every machine."""
    return map_texts(value, lambda text: re.sub(f"^{re.escape(str(ASSETS))}/", _PREFIX, text))


def is_placeholder(path: str) -> bool:
    """Returns whether a preset leaves this path to the user, as in `{folder of CogVideoX-5b}/transformer`.

    `{000..099}` and `{a,b}` are not such braces: they stand for several files.
    """
    return any(_PLACEHOLDER.search(name) for name in expand_braces(path))
