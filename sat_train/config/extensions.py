"""Extensions: Python modules of users that register parts, named on the command line and never by YAML.

The loaded extensions are recorded with the run, and a run that was trained with an extension is resumed,
sampled and converted with the same one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from sat_train.config.parts.registry import remove_parts
from sat_train.config.values import COMMAND_LINE
from sat_train.errors import ConfigError, Fault
from sat_train.files import read_bytes

KEY = "extensions"  # in `resolved.yaml`, which records them; YAML loads none
VARIABLE = "SAT_TRAIN_EXTENSIONS"
_FLAG = "--extension"
_ACCEPT = "--accept-changed-extension"
_MAX_BYTES = 2**24  # of a source file


@dataclass(frozen=True)
class Extension:
    """An extension, as loaded.

    Args:
        name: Name of its module.
        version: Its `__version__`; empty where it has none.
        files: `sha256 path` of each of its Python files, sorted by path.
    """

    name: str
    version: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Extensions:
    """The extensions of a command line.

    Args:
        loaded: The extensions, in their order.
        accept_changed: Files may differ from those that a run was trained with.
    """

    loaded: tuple[Extension, ...] = ()
    accept_changed: bool = False

    def tree(self) -> dict[str, Any]:
        """Returns the record of the extensions that a run keeps."""
        return {each.name: {"version": each.version, "files": list(each.files)} for each in self.loaded}

    def faults(self, recorded: Any, source: str) -> Iterator[Fault]:
        """Yields a fault for each recorded extension that was not loaded, or whose files differ.

        Args:
            recorded: The record of a run, from a file that may hold anything.
            source: That file.
        """
        loaded = self.tree()
        for name, record in recorded.items() if isinstance(recorded, dict) else [("", recorded)]:
            path = f"{KEY}.{name}"
            if not isinstance(recorded, dict) or not _is_record(record):
                yield Fault(path.rstrip("."), "", "version and files of each, as a run writes them", source)
            elif name not in loaded:
                yield Fault(
                    path, "", f"`{_FLAG} {name}` on the command line: {source} was written with it", source
                )
            elif changed := _changes(record, loaded[name]):
                expected = f"the files that {source} was written with, or `{_ACCEPT}`"
                if not self.accept_changed:
                    yield Fault(path, f"{', '.join(changed)} changed", expected, source)


def _is_record(record: Any) -> bool:
    files = record.get("files") if isinstance(record, dict) else None
    return isinstance(files, list) and all(isinstance(line, str) for line in files)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = {line.partition(" ")[2] for line in set(old["files"]) ^ set(new["files"])}
    return sorted(names) or ["version"] * (old.get("version") != new["version"])


def take_extension_words(words: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """Separates the words of a command line that concern extensions from the others.

    Returns:
        Names, those of `SAT_TRAIN_EXTENSIONS` first; whether changed ones are accepted; the other words.

    Raises:
        ConfigError: A flag without a name.
    """
    names = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == _FLAG or word.startswith(f"{_FLAG}="):
            name = word.partition("=")[2] or ("" if "=" in word else next(remaining, ""))
            if not name or name.startswith("--"):
                raise _refused("", "a Python file, a folder or an installed package after it")
            names.append(name)
        elif word != _ACCEPT:
            rest.append(word)
    return list(dict.fromkeys(names)), _ACCEPT in words, rest


def load_extensions(words: Sequence[str]) -> tuple[Extensions, list[str]]:
    """Imports the extensions that a command line names, and unregisters the parts of all others.

    Args:
        words: A command line.

    Returns:
        The extensions, and the other words.

    Raises:
        ConfigError: One does not exist, raises on import, imports torch or has the name of another.
    """
    names, accept_changed, rest = take_extension_words(words)
    while _imported:  # by an earlier configuration of this process: its parts are not for this one
        _forget(_imported.pop())
    return Extensions(tuple(_load(name) for name in names), accept_changed), rest


_imported: list[str] = []


def _forget(module: str) -> None:
    remove_parts(module)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
        del sys.modules[name]


def _load(name: str) -> Extension:
    had_torch = "torch" in sys.modules
    spec = _find(name)
    _imported.append(spec.name)
    try:
        module = import_module(spec.name) if spec.name in sys.modules else _execute(spec)
        files = _hash_files(spec)
    except Exception as error:
        raise _refused(name, f"a module that can be imported; {_where(error, spec)}") from error
    if "torch" in sys.modules and not had_torch:
        raise _refused(name, "torch in a second file, which `build=` names: `sat-train check` has none")
    return Extension(spec.name, str(getattr(module, "__version__", "")), files)


def _find(name: str) -> ModuleSpec:
    """Returns the file of an extension: a file, a folder with `__init__.py`, or an installed package."""
    path = Path(os.path.expanduser(name)).absolute()
    entry = path / "__init__.py" if path.is_dir() else path
    if entry.is_file():
        stem = path.stem if path.is_file() else path.name
        folders = [str(path)] if path.is_dir() else None
        spec = importlib.util.spec_from_file_location(stem, entry, submodule_search_locations=folders)
        if not stem.isidentifier() or entry.suffix != ".py":
            raise _refused(name, "a file or folder whose name is a Python name, such as my_camera.py")
        origin = getattr(sys.modules.get(stem), "__file__", None) if stem in sys.modules else str(entry)
        if origin != str(entry) or stem in sys.stdlib_module_names:
            raise _refused(name, f"another name: there is a module '{stem}' already ({origin or 'built in'})")
    else:
        spec = _find_installed(name)
    if spec is None or not spec.origin:
        what = "a folder without __init__.py" if path.is_dir() else "there is no such file or package"
        raise _refused(name, f"a Python file, a folder with __init__.py, or an installed package; {what}")
    return spec


def _find_installed(name: str) -> ModuleSpec | None:
    if not all(word.isidentifier() for word in name.split(".")):
        return None
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _execute(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    assert spec.loader is not None, "the file was found"
    spec.loader.exec_module(module)
    return module


def _where(error: Exception, spec: ModuleSpec) -> str:
    """Returns the innermost line of the extension's own files in an error's traceback, and the error."""
    folder, frames = Path(spec.origin or "").parent, list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if Path(frame.filename).parent == folder]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(spec.origin)
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    return f"{place} raises {type(error).__name__}: {error}"


def _hash_files(spec: ModuleSpec) -> tuple[str, ...]:
    entry = Path(spec.origin or "")
    folder = entry.parent
    paths = sorted(folder.rglob("*.py")) if spec.submodule_search_locations else [entry]
    lines = []
    for path in paths:
        digest = hashlib.sha256(read_bytes(path, limit=_MAX_BYTES)).hexdigest()
        lines.append(f"{digest} {path.relative_to(folder).as_posix()}")
    return tuple(lines)


def _refused(name: str, expected: str) -> ConfigError:
    return ConfigError([Fault(_FLAG, name, expected, COMMAND_LINE)])
