"""Expands names that stand for several files: ranges and lists in braces, and wildcards."""

from __future__ import annotations

import glob
import math
import re
from pathlib import Path

_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})", re.ASCII)
_MAX_RANGE = 1_000_000  # a longer one is a typo, not a data set
_MAX_CHARACTERS = 100_000_000  # of all names together


def expand_braces(text: str) -> list[str]:
    """Returns the names that a pattern stands for, in its own order.

    WebDataset's syntax: `{000..099}` is a range, zero-padded if one of its ends is; `{a,b}` is a list. Other
    braces are literal, and so are all braces if they would make more names than any data set has.
    """
    count = math.prod(len(_choices(group[1])) or 1 for group in _GROUP.finditer(text))
    if count * len(text) > _MAX_CHARACTERS:  # known in advance, unless braces are nested
        return [text]
    names: list[str] = []
    pending = [text]
    while pending:
        name = pending.pop()
        expanded = _expand_first(name)
        if expanded is None:
            names.append(name)
        else:
            pending += reversed(expanded)
        if (len(names) + len(pending)) * len(text) > _MAX_CHARACTERS:
            return [text]
    return names


def _expand_first(text: str) -> list[str] | None:
    """Expands the first group of braces in a text; None if there is none to expand."""
    for group in _GROUP.finditer(text):
        choices = _choices(group[1])
        if len(choices) * len(text) > _MAX_CHARACTERS:
            return None
        if choices:
            return [text[: group.start()] + choice + text[group.end() :] for choice in choices]
    return None


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
    """Returns the file or folder of this name on this machine, else the matches of its wildcards, sorted.

    `**` is any number of folders; links are not followed there, because they may form a cycle. Hidden
    files and folders match no wildcard.
    """
    if Path(name).exists():
        return [Path(name)]
    parts = Path(name).parts
    count = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root, wild = Path(*parts[:count]), _one_walk(parts[count:])
    matches = root.glob("/".join(wild)) if wild else ()
    return sorted({path for path in matches if not _is_hidden(path.relative_to(root), wild)})


def _one_walk(parts: tuple[str, ...]) -> list[str]:
    """Removes a `**` after another `**`, which matches nothing more and takes much longer."""
    wild: list[str] = []
    for part in parts:
        part = part if part == "**" else re.sub(r"\*+", "*", part)
        if wild[-1:] != ["**"] or part != "**":
            wild.append(part)
    return wild


def _is_hidden(path: Path, wild: list[str]) -> bool:
    return any(part.startswith(".") and part not in wild for part in path.parts)
