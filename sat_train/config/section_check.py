"""Validation of a merged tree: records, or all faults at once in words that the user can act on."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from sat_train.config.aliases import get_value
from sat_train.config.catalog import (
    all_keys,
    named_target,
    pattern_of,
    slot_targets,
    suggest_key,
    suggest_value,
    target_names,
)
from sat_train.config.layers import Merged
from sat_train.config.run import Sections
from sat_train.config.sat_forks import about_class
from sat_train.config.values import show_value
from sat_train.errors import Fault

_KEY = ("[key]",)  # pydantic's mark of a key that is itself wrong
_ROUNDS = 5  # a value is removed, then replaced, and its replacement may hold such a value in turn


def validate(
    merged: Merged, stand_in: Callable[[], dict[str, Any]], faults: list[Fault], *, is_whole: bool = True
) -> Sections | None:
    """Turns the tree into records.

    Args:
        merged: The merged layers.
        stand_in: Returns a complete tree, the source of required values that are wrong or missing.
        faults: Receives everything wrong in the tree.
        is_whole: All files could be read; else nothing is called missing.

    Returns:
        The records, so that all other rules can be checked in the same go: in place of a fault they hold the
        default or the stand-in's value. None when even that is not possible.
    """
    tree = copy.deepcopy(merged.tree)
    faulty = {fault.path for fault in faults}
    faulty |= {f"{path.removesuffix('.target')}.params" for path in faulty if path.endswith(".target")}
    faulty |= merged.derived
    for _ in range(_ROUNDS):
        try:
            return Sections.model_validate(tree)
        except ValidationError as error:
            details = error.errors(include_url=False)
            paths = [_path_of(detail["loc"], tree) for detail in details]  # before anything is repaired
            for detail, path in zip(details, paths, strict=True):
                is_new = is_whole or detail["type"] != "missing"
                if is_new and not any(_is_within(path, known) or _is_within(known, path) for known in faulty):
                    faults.append(_fault(detail, path, merged))
                faulty.add(path)
                if target_names(path):  # its allowed params are unknown then
                    faulty.add(f"{path.rpartition('.')[0]}.params")
                _repair(tree, path, stand_in() if detail["type"] == "missing" else {})
    return None


def _path_of(location: tuple[int | str, ...], tree: Any) -> str:
    """Returns the dotted path of an error, without the union members that pydantic inserts."""
    parts: list[str] = []
    location = location[:-1] if location[-1:] == _KEY else location
    for index, part in enumerate(location):
        inner = get_value(tree, str(part))
        is_last = index == len(location) - 1
        if inner is not PydanticUndefined or (is_last and isinstance(tree, dict)):
            parts.append(str(part))
            tree = inner
    return ".".join(parts)


def _is_within(path: str, group: str) -> bool:
    return path == group or path.startswith(f"{group}.")


def _fault(detail: ErrorDetails, path: str, merged: Merged) -> Fault:
    kind = detail["type"]
    if kind == "union_tag_invalid":
        path = f"{path}.target"
    value = get_value(merged.tree, path)
    text = "" if value is PydanticUndefined else show_value(value)
    suggestion = ""
    if kind == "extra_forbidden":
        expected, suggestion = _expected_key(path, merged)
        text = text if "." in path else ""  # a file that is no configuration may hold anything
    elif detail["loc"][-1:] == _KEY:
        text, expected = "", "a name of letters, digits and `_`, which begins with a letter"
    elif kind == "missing":
        expected = f"{_expected(path)}, but it is missing"
    elif kind == "union_tag_not_found":
        expected = f"a target: one of {', '.join(target_names(f'{path}.target'))}"
    elif kind in ("union_tag_invalid", "literal_error"):
        choices = _choices(path)
        expected, suggestion = f"one of {', '.join(choices)}", suggest_value(text, choices, path)
    elif kind == "string_type" and isinstance(value, (int, float)):
        expected = "text, in quotes where YAML would read a number or true and false"
    else:
        expected = _expected(path)
    expected = expected.replace("one of ", "", "," not in expected)
    if kind in ("union_tag_invalid", "literal_error"):
        expected += about_class(path, text) or _about_extensions(path, suggestion)
    return Fault(path, text, expected, merged.source_of(path), suggestion)


def _about_extensions(path: str, suggestion: str) -> str:
    """Returns what to do about a part that no name resembles: it may be that of an extension."""
    names_a_part = pattern_of(path).rpartition(".")[0] in slot_targets()
    return ", or a part of an extension that --extension names" if names_a_part and not suggestion else ""


def _expected_key(path: str, merged: Merged) -> tuple[str, str]:
    """Returns the expectation for an unknown key: of a part, the settings of that part."""
    value_of = partial(get_value, merged.tree)
    inside, around = (path.rpartition(separator)[0] for separator in (".params.", "."))
    named = named_target(inside, value_of) or named_target(around, value_of)
    if named is None or (named.table.place and pattern_of(path) not in all_keys()):
        return "a key that exists", suggest_key(path)
    settings = named.params.model_fields
    near = difflib.get_close_matches(path.rpartition(".")[2], settings, n=1)
    return f"a setting of {named.name}: {', '.join(settings)}", "".join(near)


def _expected(path: str) -> str:
    """Returns in words the values that a key accepts; for an index of a list, those of the list."""
    keys, pattern = all_keys(), pattern_of(path)
    key = keys.get(pattern) or keys.get(pattern.removesuffix(".*"))
    if key is None:
        return "a mapping of sections"
    return f"{key.expected} ({key.description.rstrip('.')})" if key.is_section else key.expected


def _choices(path: str) -> list[str]:
    return target_names(path) or _expected(path).removeprefix("one of ").removesuffix(" or null").split(", ")


def _repair(tree: Any, path: str, stand_in: dict[str, Any]) -> None:
    """Removes a wrong value from the tree, or replaces it by the stand-in's value."""
    *groups, leaf = path.split(".")
    parent = get_value(tree, ".".join(groups)) if groups else tree
    if not isinstance(parent, dict):
        return
    parent.pop(leaf, None)
    replacement = get_value(stand_in, path)
    if replacement is not PydanticUndefined:
        parent[leaf] = copy.deepcopy(replacement)
