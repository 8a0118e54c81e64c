"""From a merged tree to records, or to all faults at once in words that a person can act on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from sat_train.config.aliases import get_value
from sat_train.config.catalog import all_keys, pattern_of, slot_targets, suggest_key, suggest_value
from sat_train.config.layers import Merged
from sat_train.config.run import Sections
from sat_train.errors import Fault

_SHOWN_VALUE = 60
_ROUNDS = 5  # a value is taken out, then replaced, and its replacement may hold such a value in turn


def validate(merged: Merged, stand_in: Callable[[], dict[str, Any]], faults: list[Fault]) -> Sections | None:
    """Turns the tree into records.

    Args:
        merged: The merged layers.
        stand_in: Gives a complete tree, from which required values that are wrong or missing are taken.
        faults: Gets everything wrong in the tree.

    Returns:
        The records, so that all other rules can be checked in the same go: where a value is a fault they hold its default
        or the stand-in's. None when even that is not possible.
    """
    tree = copy.deepcopy(merged.tree)
    named: set[str] = set()
    for _ in range(_ROUNDS):
        try:
            return Sections.model_validate(tree)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path = _path_of(detail["loc"], tree)
                if not any(path == known or path.startswith(f"{known}.") for known in named):
                    faults.append(_fault(detail, path, merged))
                named.add(path)
                _repair(tree, path, stand_in() if detail["type"] == "missing" else {})
    return None


def _path_of(location: tuple[int | str, ...], tree: Any) -> str:
    """Returns the dotted path of an error without the names of union members that pydantic puts in between."""
    parts: list[str] = []
    for index, part in enumerate(location):
        if (isinstance(tree, list) and isinstance(part, int) and part < len(tree)) or (
            isinstance(tree, dict) and part in tree
        ):
            tree = tree[part]
        elif index < len(location) - 1 or isinstance(tree, (str, int, float, bool, list)):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _fault(detail: ErrorDetails, path: str, merged: Merged) -> Fault:
    source = merged.source_of(path)
    value = get_value(merged.tree, path)
    shown = "" if value is PydanticUndefined else _show(value)
    wording: Mapping[str, Callable[[], tuple[str, str]]] = {
        "extra_forbidden": lambda: ("a key that exists", suggest_key(path)),
        "missing": lambda: (f"{_expected(path)}, but it is missing", ""),
        "union_tag_invalid": lambda: _unknown_target(f"{path}.target", merged),
        "union_tag_not_found": lambda: (f"a target: {_targets(path)}", ""),
        "literal_error": lambda: _unknown_choice(path, shown),
    }
    if detail["type"] == "union_tag_invalid":
        target = get_value(merged.tree, f"{path}.target")
        shown, source = _show(target), merged.source_of(f"{path}.target")
    expected, suggestion = wording.get(detail["type"], lambda: (_expected(path, detail), ""))()
    if detail["type"] == "union_tag_invalid":
        path = f"{path}.target"
    return Fault(path, shown, expected, source, suggestion)


def _expected(path: str, detail: ErrorDetails | None = None) -> str:
    key = all_keys().get(pattern_of(path))
    if key is not None:
        return f"{key.expected} ({key.description.rstrip('.')})" if key.is_section else key.expected
    parent = all_keys().get(pattern_of(path.rpartition(".")[0]))
    if parent is not None and detail is not None:
        return f"{parent.expected}"
    return detail["msg"] if detail else "a value"


def _targets(path: str) -> str:
    return ", ".join(sorted(slot_targets().get(pattern_of(path), {})))


def _unknown_target(path: str, merged: Merged) -> tuple[str, str]:
    slot = path.removesuffix(".target")
    names = sorted(slot_targets().get(pattern_of(slot), {}))
    value = get_value(merged.tree, path)
    return f"one of {', '.join(names)}", suggest_value(str(value), names)


def _unknown_choice(path: str, shown: str) -> tuple[str, str]:
    expected = _expected(path)
    if path.endswith(".target"):
        names = sorted(slot_targets().get(pattern_of(path.removesuffix(".target")), {}))
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0], suggest_value(shown, names)
    return expected, suggest_value(shown, expected.removeprefix("one of ").split(", "))


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 3]}..."


def _repair(tree: Any, path: str, stand_in: dict[str, Any]) -> None:
    """Takes a wrong value out of the tree, or puts the stand-in's value there."""
    *groups, leaf = path.split(".")
    parent = get_value(tree, ".".join(groups)) if groups else tree
    if not isinstance(parent, dict):
        return
    parent.pop(leaf, None)
    replacement = get_value(stand_in, path)
    if replacement is not PydanticUndefined:
        parent[leaf] = copy.deepcopy(replacement)
