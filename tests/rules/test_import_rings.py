"""No module and no folder of the package needs one that needs it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "sat_train"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(name: str) -> Iterator[str]:
    """Yields the modules of the package that a module imports at its top, for types included."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    inside = {
        child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (member if member in MODULES else node.module for member in members)


def folder(name: str) -> str:
    """Returns the package whose folder a module lies in; one at the top of `sat_train` stands for itself."""
    parent = name.rpartition(".")[0]
    return name if MODULES[name].name == "__init__.py" or parent == "sat_train" else parent


def ring(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns the nodes of one ring, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_ring_of_modules() -> None:
    assert ring({name: set(imports(name)) - {name} for name in MODULES}) == []


def test_no_ring_of_folders() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for name in MODULES:
        graph[folder(name)] |= {folder(imported) for imported in imports(name)} - {folder(name)}
    assert ring(graph) == []


def test_a_ring_is_found() -> None:
    assert set(ring({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
