"""`sat-train new-extension`: writes the skeleton of an extension, which passes its own test."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from sat_train.config.paths import ASSETS
from sat_train.errors import LaunchError
from sat_train.files import write_text

_SKELETONS = ASSETS / "new_extension"
KINDS = tuple(sorted(path.name for path in _SKELETONS.iterdir() if path.is_dir()))
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def main(argv: Sequence[str]) -> int:
    """Writes the skeleton and prints what to do with it.

    Args:
        argv: The words after `sat-train new-extension`.

    Raises:
        LaunchError: The name is none for a module, or the folder exists.
    """
    options = _parser().parse_args(argv)
    folder = write_skeleton(options.folder, options.name, options.kind)
    print(f"wrote {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}")
    print(f"\ntry it:  pytest -s {folder}")
    print(
        f"use it:  sat-train train --extension {folder} --base configs/sft.yaml {folder}/{options.name}.yaml"
    )
    return 0


def write_skeleton(parent: Path, name: str, kind: str) -> Path:
    """Writes an extension that works: records, torch code, YAML, README and a test of the laws.

    Args:
        parent: Where to create its folder.
        name: Its name, and that of the folder.
        kind: One of `KINDS`.

    Returns:
        The folder.

    Raises:
        LaunchError: The name is none for a module, or the folder exists.
    """
    folder = parent / name
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise LaunchError(
            f"'{name}' cannot be the name of an extension",
            expected="small letters, digits and _, such as camera_control, and no module of Python's own",
        )
    if folder.exists():
        raise LaunchError(f"{folder} exists already", expected="a new folder", remedy="choose another name")
    words = {"name": name, "Name": "".join(part.capitalize() for part in name.split("_"))}
    shown = {path.name: path for place in (_SKELETONS, _SKELETONS / kind) for path in place.glob("*.txt")}
    names = {"config.yaml": f"{name}.yaml", "test.py": f"test_{name}.py"}
    folder.mkdir(parents=True)
    for file, path in shown.items():
        plain = file.removesuffix(".txt")
        text = Template(path.read_text(encoding="utf-8")).substitute(words)
        write_text(folder / names.get(plain, plain), text)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train new-extension",
        description="Writes the skeleton of an extension: a folder that works and passes its own test, to be "
        "changed step by step (docs/extend.md).",
        allow_abbrev=False,
    )
    parser.add_argument("name", help="name of the extension, such as camera_control")
    parser.add_argument(
        "--kind", choices=KINDS, default="condition", help="what it adds (default: condition)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="PATH", help="parent of the new folder NAME"
    )
    return parser
