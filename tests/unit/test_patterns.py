"""Wildcards: what a person means by them, in a time that ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.patterns import find_local


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.tar", "b/a.tar", "b/c/a.tar", "b/c/d.txt", ".hidden/a.tar", "b/.a.tar", "[1]/a.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", {"a.tar"}),
        ("*.tar", {"a.tar"}),
        ("*/*.tar", {"b/a.tar", "[1]/a.tar"}),
        ("*/*/*.tar", {"b/c/a.tar"}),
        ("**/*.tar", {"a.tar", "b/a.tar", "b/c/a.tar", "[1]/a.tar"}),
        ("b/**/a.tar", {"b/a.tar", "b/c/a.tar"}),
        ("?/c/?.***", {"b/c/a.tar", "b/c/d.txt"}),
        (".hid*/*.tar", set()),
        (".hidden/*.tar", {".hidden/a.tar"}),
        ("[1]/*.tar", set()),
        ("[[]1]/*.tar", {"[1]/a.tar"}),
        ("nothing", set()),
        ("b/../*.tar", {"b/../a.tar"}),
    ],
)
def test_wildcards_stand_for_what_they_match(tree: Path, pattern: str, names: set[str]) -> None:
    assert find_local(str(tree / pattern)) == sorted(tree / name for name in names)


def test_a_circle_of_links_and_repeated_wildcards_end(tree: Path) -> None:
    (tree / "b" / "up").symlink_to("..")
    (tree / "again").symlink_to(".")
    result = find_local(str(tree / ("**/" * 30) / "*.tar"))
    assert [path.relative_to(tree).as_posix() for path in result] == [
        "[1]/a.tar",
        "a.tar",
        "b/a.tar",
        "b/c/a.tar",
    ]
