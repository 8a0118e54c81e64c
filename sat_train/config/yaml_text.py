"""YAML text as OmegaConf reads it, once it is known to hold nothing but plain values.

A configuration may be untrusted. So these are refused before anything is built from it: tags, unbounded
nesting or repetition, and any `${...}` but the plain name of another key. OmegaConf's resolvers (`oc.env`,
`oc.decode`, ...) could carry the environment into saved files and requests; none can be named.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml
from omegaconf import OmegaConf

from sat_train.config.catalog import all_keys, pattern_of

REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}", re.ASCII)
WANTED_REFERENCE = (
    "a reference `${section.key}` to a key with a value; resolvers such as `oc.env` are refused"
)
WANTED_SECTIONS = "sections such as `args:` and `model:`"
MAX_BYTES = 1_000_000  # of a file; the longest that is shipped has 5,000
_MAX_DEPTH = 40
_MAX_NODES = 100_000  # with what aliases repeat
_KEY = re.compile(r"[\w-]+|<<", re.ASCII)
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ["str", "int", "float", "bool", "null", "map", "seq"]
)


class NotPlain(Exception):
    """Raised for a text that is not plain YAML.

    Args:
        expected: The expectation, in words.
        path: Dotted key of the fault; empty for the text as a whole.
        value: The value there.
    """

    def __init__(self, expected: str, path: str = "", value: str = "") -> None:
        super().__init__(expected)
        self.expected, self.path, self.value = expected, path, value


def is_plain(text: str) -> bool:
    """Returns whether every `${` in a text begins a plain reference; nested and escaped ones do not."""
    return "${" not in REFERENCE.sub("", text) and "\\${" not in text


def parse_yaml(text: str) -> Any:
    """Returns the mappings with text keys, lists and scalars of one document. References stay as they are.

    A section with nothing under it is empty; null must be written as `null`.

    Raises:
        NotPlain: It cannot be read, or holds more than plain values. The message quotes none of it.
    """
    content, blanks = copy.deepcopy(_parsed(text))
    for path in blanks:
        _fill_blank_section(content, path)
    return content


@lru_cache(maxsize=32)  # a process that reads several configurations meets the same files in all of them
def _parsed(text: str) -> tuple[Any, list[list[str]]]:
    """Returns the content of a text, and the paths of values that are left blank."""
    with _plain_or_refused():
        outline = _Outline()
        blanks = outline.read(text)
        if outline.is_scalar:
            raise NotPlain(WANTED_SECTIONS)
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    return _with_text_keys(content), blanks


def parse_value(text: str) -> Any:
    """Returns the value that a text stands for in YAML, e.g. a number or a list.

    Raises:
        NotPlain: As `parse_yaml`.
    """
    with _plain_or_refused():
        _Outline().read(text)
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return _with_text_keys(content)["value"]


@contextmanager
def _plain_or_refused() -> Iterator[None]:
    try:
        yield
    except NotPlain:
        raise
    except Exception as error:  # parsers fail in as many ways as there are broken texts
        raise NotPlain(f"readable YAML, but: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns a parser's reason and position, without the quoted lines: the file may not be YAML at all."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        return f"{error.problem}{where}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character that YAML does not allow at position {error.position}"
    if isinstance(error, (ValueError, OverflowError)):
        return "a number that cannot be read"
    return type(error).__name__


@dataclass
class _Open:
    """A mapping or list that has begun and not ended."""

    is_mapping: bool
    anchor: str | None
    size: int = 1
    key: str = ""
    count: int = 0
    wants_key: bool = True

    def place(self) -> str:
        return self.key if self.is_mapping else str(self.count)


class _Outline:
    """Reads a text event by event, so that nothing has been built when it is refused."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._sizes: dict[str, int] = {}
        self._blanks: list[list[str]] = []
        self.is_scalar = False

    def read(self, text: str) -> list[list[str]]:
        """Returns the paths of values that are left blank."""
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                self._begin(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                ended = self._open.pop()
                self._end(ended.size, ended.anchor)
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in self._sizes:
                    raise NotPlain(f"an alias of an anchor above it, not *{event.anchor[:40]}", self._path())
                self._end(self._sizes[event.anchor], None)
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event)
        return self._blanks

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        self._check_tag(event.tag)
        if self._open and self._open[-1].is_mapping and self._open[-1].wants_key:
            raise NotPlain("a word as a key", self._path())
        if len(self._open) >= _MAX_DEPTH:
            raise NotPlain(f"at most {_MAX_DEPTH} levels of nesting")
        self._open.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor))

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        self._check_tag(event.tag)
        inside = self._open[-1] if self._open else None
        self.is_scalar = inside is None
        if inside is not None and inside.is_mapping and inside.wants_key:
            self._key(inside, event.value)
            return
        if not is_plain(event.value):
            raise NotPlain(WANTED_REFERENCE, self._path(), event.value)
        if inside is not None and inside.is_mapping and event.value == "" and event.implicit[0]:
            self._blanks.append([node.place() for node in self._open])
        self._end(1, event.anchor)

    def _key(self, inside: _Open, key: str) -> None:
        if not _KEY.fullmatch(key):
            nested = "; `a.b: c` is written `a: {b: c}`" if "." in key else ""
            raise NotPlain(f"keys of letters, digits, `_` and `-`{nested}", self._path(), key)
        inside.key, inside.wants_key = key, False

    def _end(self, size: int, anchor: str | None) -> None:
        """Counts a complete value, and advances to the next."""
        if anchor is not None:
            self._sizes[anchor] = size
        if not self._open:
            return
        inside = self._open[-1]
        inside.size += size
        inside.count += 1
        inside.wants_key = True
        if inside.size > _MAX_NODES:
            raise NotPlain(f"at most {_MAX_NODES:,} values, with what aliases repeat")

    def _check_tag(self, tag: str | None) -> None:
        if tag is not None and tag not in _TAGS:
            raise NotPlain("plain values; tags such as `!name` are refused", self._path(), tag)

    def _path(self) -> str:
        places = [node.place() for node in self._open]
        return ".".join(place for place in places if place)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


def _fill_blank_section(tree: Any, path: list[str]) -> None:
    key = all_keys().get(pattern_of(".".join(path)))
    if key is None or not key.is_section:
        return
    for part in path[:-1]:
        tree = tree.get(part) if isinstance(tree, dict) else tree[int(part)]
    if isinstance(tree, dict) and tree.get(path[-1], "") is None:
        tree[path[-1]] = {}
