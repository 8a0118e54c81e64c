"""`${section.key}`: the value of another key. Nothing else is resolved, and nothing is executed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from sat_train.config.aliases import get_value
from sat_train.config.layers import Merged, replace_value
from sat_train.config.values import show_value
from sat_train.config.yaml_text import REFERENCE, WANTED_REFERENCE, is_plain
from sat_train.errors import Fault


def resolve_references(merged: Merged, faults: list[Fault]) -> None:
    """Replaces `${a.b}` in the merged tree by the value of the key `a.b`.

    A reference leads to a value, not to another reference: so there are no cycles, and no text can blow up.

    Args:
        merged: Changed in place.
        faults: Receives all that are not plain references, or lead to nothing.
    """
    original = copy.deepcopy(merged.tree)
    for parts, text in _texts(original, ()):
        path = ".".join(parts)
        value = _resolve(text, original) if is_plain(text) else PydanticUndefined
        if value is PydanticUndefined:
            faults.append(Fault(path, text, WANTED_REFERENCE, merged.source_of(path)))
            value = None  # it must not keep the others from being read
        replace_value(merged.tree, parts, value)


def _resolve(text: str, tree: Any) -> Any:
    if whole := REFERENCE.fullmatch(text):
        return copy.deepcopy(_value(whole[1], tree))
    values = [_value(match[1], tree) for match in REFERENCE.finditer(text)]
    if not all(isinstance(value, (str, int, float)) for value in values):
        return PydanticUndefined
    parts = iter(values)
    resolved = REFERENCE.sub(lambda _: show_value(next(parts)), text)
    return PydanticUndefined if "${" in resolved else resolved


def _value(path: str, tree: Any) -> Any:
    value = get_value(tree, path)
    return PydanticUndefined if next(_texts(value, ()), None) is not None else value


def _texts(value: Any, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the texts that contain a reference."""
    if isinstance(value, str) and "${" in value:
        yield parts, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, (*parts, str(key)))
