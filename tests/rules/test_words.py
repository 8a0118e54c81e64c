"""One name has one meaning in the whole repository, and it is the field's word where the field has one.

A second class or module of one name makes every search ambiguous, and a private word has to be learnt by each
newcomer. `docs/design.md` holds the glossary; the words below are those that it has replaced.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.test_house_rules import MODULES, ROOT, SOURCES

# Each package has a `build.py`, by the rule that configuration becomes objects there and nowhere else.
SHARED_MODULES = {"__init__.py", "build.py"}

# What was said before, and what to say.
IDENTIFIERS = {
    "ProcessGrid": "ProcessMesh",
    "SatGrid": "SatMesh",
    "run_folder": "run_directory",
    "Place": "RunDirectory, ClipRef, TensorSlot or ProcessLocation",
    "Stepper": "TrainStep",
    "WeightAverage": "ExponentialMovingAverage",
    "FrozenModels": "Encoders",
    "FileBook": "FileMetadata",
    "FittedClip": "ClipAssignment",
    "Planned": "ClipSet",
    "TrainEntry": "TrainMetrics",
    "ValidationEntry": "ValidationMetrics",
}
PROSE = {
    "process grid": "process mesh",
    "run folder": "run directory",
    "run folders": "run directories",
    "anew": "again",
    "goes on from": "resumes",
    "going on from": "resuming from",
    "rid of": "removes",
}

# Words that the package and the pages of the docs have replaced as well.
PLAIN = {
    "beside": "next to",
    "looked at": "inspected",
    "looks at": "inspects",
    "looked into": "inspected",
    "for ever": "forever",
}
# First words of a docstring that describe a thing by a clause, instead of naming it.
CLAUSES = {"What", "Which", "Where", "Who", "How", "Whether", "Says", "Tells", "Gives", "Looks", "Takes"}

# The change log keeps the words of its day.
PAGES = [path for pattern in ("*.md", "docs/*.md") for path in ROOT.glob(pattern) if path.stem != "CHANGELOG"]
PROSE_FILES = [*(path for path in SOURCES if path != Path(__file__)), *PAGES]


def classes(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def identifiers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name


def test_no_two_public_classes_have_one_name() -> None:
    counts = Counter(name for path in MODULES for name in classes(path))
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_two_modules_have_one_name() -> None:
    counts = Counter(path.name for path in MODULES if path.name not in SHARED_MODULES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_identifiers_are_the_words_of_the_glossary() -> None:
    strays = [
        f"{path}: {name} -> {IDENTIFIERS[name]}"
        for path in SOURCES
        for name in set(identifiers(path)) & IDENTIFIERS.keys()
    ]
    assert not strays, "say instead:\n" + "\n".join(strays)


@pytest.mark.parametrize(
    ("words", "paths"),
    [(PROSE, PROSE_FILES), (PLAIN, [*MODULES, *PAGES])],
    ids=["words of the glossary", "plain words"],
)
def test_prose_uses(words: dict[str, str], paths: list[Path]) -> None:
    pattern = re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)
    strays = [
        f"{path}: {match[0]} -> {words[match[0].lower()]}"
        for path in paths
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not strays, "say instead:\n" + "\n".join(strays)


def test_a_docstring_names_the_thing_or_starts_with_a_verb() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    strays = []
    for path in MODULES:
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)
        ]
        openings = [(ast.get_docstring(node) or "-").split()[0] for node in nodes]
        strays += [f"{path}: {word}" for word in openings if word in CLAUSES]
    assert not strays
