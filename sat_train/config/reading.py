"""Reading of a YAML file and of the files under its `base`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from sat_train.config.paths import PACKAGE, find_config
from sat_train.config.words import COMMAND_LINE
from sat_train.config.yaml_text import MAX_BYTES, WANTED_SECTIONS, NotPlain, parse_yaml
from sat_train.errors import Fault
from sat_train.files import NotRegular, TooLarge, read_text

RESOLVED = "resolved.yaml"  # configuration that a run saves
_SUFFIXES = (".yaml", ".yml", ".json")
_MAX_DEPTH = 20
_LISTED_FILES = 1000

# Name as the user would type it, and the content without `base`; None where it cannot be read.
File = tuple[str, dict[str, Any] | None]


class FileReader:
    """Reads each file once, at its first mention.

    Args:
        faults: Receives what cannot be read.
        follows_base: Also read the files that a file names under `base`.
    """

    def __init__(self, faults: list[Fault], *, follows_base: bool = True) -> None:
        self._faults = faults
        self._follows_base = follows_base
        self._seen: set[Path] = set()

    def read(self, path: str | Path) -> list[File]:
        """Returns the files under a file's `base`, then the file itself; nothing where it was read before."""
        file = find_config(path)
        if file is None:
            suggestion = _suggest_file(Path(path))
            self._faults.append(
                Fault("--base", str(path), "a YAML file that exists", COMMAND_LINE, suggestion)
            )
            return [(str(path), None)]
        return self._read(file, 0)

    def _read(self, path: Path, depth: int) -> list[File]:
        resolved = path.resolve()
        if resolved in self._seen:
            return []
        self._seen.add(resolved)
        name = _display(path)
        content = self._parse(path, name)
        if content is None:
            return [(name, None)]
        if self._follows_base:
            included = [
                file for item in self._base(content, path, name) for file in self._include(item, path, depth)
            ]
        else:
            content.pop("base", None)
            included = []
        return [*included, (name, content)]

    def _base(self, content: dict[str, Any], path: Path, name: str) -> list[str]:
        base = content.pop("base", None) or []
        base = [base] if isinstance(base, str) else base
        if not isinstance(base, list) or not all(isinstance(item, str) for item in base):
            self._faults.append(Fault("base", "", "a list of YAML files, relative to this one", name))
            return []
        if base and path.name == RESOLVED:
            self._faults.append(
                Fault("base", base[0], "no other file: the configuration that a run saves is complete", name)
            )
            return []
        return base

    def _include(self, item: str, path: Path, depth: int) -> list[File]:
        name, target = _display(path), path.parent / item
        file = find_config(target) if item.lower().endswith(_SUFFIXES) else None
        if file is None or depth >= _MAX_DEPTH:
            expected = (
                "a YAML file that exists" if depth < _MAX_DEPTH else f"at most {_MAX_DEPTH} files in a row"
            )
            self._faults.append(Fault("base", item, expected, name, _suggest_file(target)))
            return [(item, None)]
        return self._read(file, depth + 1)

    def _parse(self, path: Path, name: str) -> dict[str, Any] | None:
        try:
            content = parse_yaml(read_text(path, limit=MAX_BYTES))
        except NotPlain as problem:
            self._faults.append(
                Fault(problem.path or name, problem.value, problem.expected, name if problem.path else "")
            )
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._faults.append(Fault(name, "", _expected_file(error)))
            return None
        if not isinstance(content, dict):
            self._faults.append(Fault(name, "", WANTED_SECTIONS))
            return None
        return content


def _expected_file(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, NotRegular):
        return "a YAML file; this is a folder, pipe or device"
    if isinstance(error, TooLarge):
        return f"a YAML file of at most {MAX_BYTES:,} bytes"
    if isinstance(error, UnicodeDecodeError):
        return f"YAML in UTF-8; byte {error.start} is none"
    return f"a YAML file that can be read: {error.strerror}"


def _display(path: Path) -> str:
    """Returns the shortest path that can be typed: within the package, within this folder, or whole."""
    path = Path(os.path.normpath(path))
    for folder in (PACKAGE.parent, PACKAGE):
        if path.is_relative_to(folder / "configs"):
            return str(path.relative_to(folder))
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _suggest_file(path: Path) -> str:
    """Returns the file that the user probably meant, in the same folder or in the package."""
    for folder in (path.parent, PACKAGE / path.parent):
        try:
            names = [entry.name for entry, _ in zip(os.scandir(folder), range(_LISTED_FILES), strict=False)]
        except (OSError, ValueError):
            continue
        names = [name for name in names if name.endswith(_SUFFIXES)]
        if near := difflib.get_close_matches(path.name, names, n=1, cutoff=0.6):
            return str(path.parent / near[0])
    return ""
