"""Names that stand for several files: ranges and lists in braces, and wildcards."""

from __future__ import annotations

import glob
import re
from pathlib import Path

_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_RANGE = 1_000_000  # a longer one is a slip of the finger, not a set


def expand_braces(text: str) -> list[str]:
    """Returns the names that a pattern stands for, in its own order.

    As WebDataset users write them: `{000..099}` counts, with zeros in front where one of its ends has them;
    `{a,b}` lists. Other braces stand for themselves.
    """
    for group in _GROUP.finditer(text):
        choices = _choices(group[1])
        if choices:
            before, after = text[: group.start()], text[group.end() :]
            return [name for choice in choices for name in expand_braces(before + choice + after)]
    return [text]


def _choices(inside: str) -> list[str]:
    ends = _RANGE.fullmatch(inside)
    if ends is None:
        return inside.split(",") if "," in inside else []
    first, last = int(ends[1]), int(ends[2])
    if abs(last - first) >= _MAX_RANGE:
        return []
    is_padded = any(len(end) > 1 and end.startswith("0") for end in ends.groups())
    width = max(map(len, ends.groups())) if is_padded else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def find_local(name: str) -> list[Path]:
    """Returns the file or folder of this name on this machine, else what its wildcards match, sorted."""
    if Path(name).exists():
        return [Path(name)]
    return sorted(map(Path, glob.glob(name, recursive=True)))
