"""All keys that exist, by dotted path, with the values that each accepts; derived from the schema."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sat_train.config.other_trainers import OUR_KEYS, our_value
from sat_train.config.parts.record import FILE_NAME, Record
from sat_train.config.parts.reference import NameOf
from sat_train.config.parts.registry import Choice, NameIn, parts_of, registry_revision
from sat_train.config.run import Sections

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
_LENGTHS = {"min_length": "at least", "max_length": "at most"}
_PATTERNS = {FILE_NAME: "of letters, digits, `_`, `-` and `.`, which does not begin with `.`"}
_OR_NULL = " or null"
_PLACE_DIGITS = 6
_NEAR_VALUE = 0.7  # cpu is 0.67 of gpu
_WHOLE_WORD = 4  # letters
_NEAR = 0.75  # `max_steps` is 0.61 of `sampling_steps`, and does not mean it
_SCALARS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Args:
        path: Dotted path; `*` stands for an index of a list or a name in a mapping.
        description: What it does.
        expected: The values that it accepts, in words.
        default: Its default, or None.
        required: It has no default.
        is_section: It holds other keys.
        is_nullable: It may hold null.
    """

    path: str
    description: str
    expected: str
    default: Any
    required: bool
    is_section: bool
    is_nullable: bool


@dataclass(frozen=True)
class Targets:
    """The parts that YAML may name at one key.

    Args:
        key: The key that holds the name: `target`, or `type` for the optimizer.
        params: Record of the settings of each, by name.
        place: The key below which the settings stand, with a dot; empty where they stand next to `key`.
    """

    key: str
    params: dict[str, type[Record]]
    place: str = "params."


@dataclass(frozen=True)
class NamedTarget:
    """The target that a configuration names.

    Args:
        name: Its name.
        table: The choices of its place.
        params: Record of its settings.
    """

    name: str
    table: Targets
    params: type[Record]


def all_keys() -> dict[str, Key]:
    """Returns every key by path; where there is a choice of targets, the keys of all of them."""
    return _keys_at(registry_revision())


@lru_cache(maxsize=1)
def _keys_at(revision: int) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for key in _walk(Sections, ""):
        if key.path not in keys or (keys[key.path].required and not key.required):
            keys[key.path] = key
    return keys


def keys_of_targets(path: str, values: Mapping[str, Any]) -> dict[str, Key]:
    """Returns every key by path; on the way to a path, only the settings of the targets that are named.

    Args:
        path: Dotted path, e.g. `model.conditions.pose.params`.
        values: Values of a configuration by dotted path.
    """
    keys, parts = dict(all_keys()), path.split(".")
    for place in (".".join(parts[: end + 1]) for end in range(len(parts))):
        named = named_target(place, values.get)
        if named is None or not named.table.place:
            continue
        settings = f"{pattern_of(place)}.{named.table.place}"
        keys = {name: key for name, key in keys.items() if not name.startswith(settings)}
        keys |= {key.path: key for key in _walk(named.params, settings)}
    return keys


def named_target(place: str, value_of: Callable[[str], object]) -> NamedTarget | None:
    """Returns the target that a configuration names at a place; None where it names none that exists.

    Args:
        place: Dotted path, e.g. `model.conditions.pose`.
        value_of: Returns the value at a dotted path.
    """
    table = slot_targets().get(pattern_of(place))
    if table is None:
        return None
    name = str(value_of(f"{place}.{table.key}"))
    return NamedTarget(name, table, table.params[name]) if name in table.params else None


def entry_of_mapping(path: str) -> Key | None:
    """Returns the description of an entry whose name the user chooses, e.g. `model.conditions.pose`."""
    pattern = pattern_of(path)
    group = all_keys().get(pattern.removesuffix(".*"))
    if group is None or group.path == pattern:
        return None
    return Key(
        pattern, f"An entry of {group.path}. {group.description}", "a section", None, True, True, False
    )


def slot_targets() -> dict[str, Targets]:
    """Returns, for each key that names a part, the closed table of its choices."""
    return _targets_at(registry_revision())


@lru_cache(maxsize=1)
def _targets_at(revision: int) -> dict[str, Targets]:
    tables: dict[str, Targets] = {}
    for path, record in _walk_records(Sections, ""):
        key = record.key if issubclass(record, Choice) else "target"
        if (target := record.model_fields.get(key)) is None:
            continue
        is_flat = "params" not in record.model_fields
        table = tables.setdefault(path, Targets(key, {}, "" if is_flat else "params."))
        for name in get_args(target.annotation):
            table.params[name] = cast(
                "type[Record]", record if is_flat else record.model_fields["params"].annotation
            )
    return tables


def target_names(path: str) -> list[str]:
    """Returns the names allowed at a key such as `model.sampler_config.target`; none for other keys."""
    place, _, key = pattern_of(path).rpartition(".")
    table = slot_targets().get(place)
    return sorted(table.params) if table is not None and table.key == key else []


def pattern_of(path: str) -> str:
    """Returns the path with `*` for indices of lists and names in mappings, as `all_keys` spells it."""
    parts: list[str] = []
    for part in path.split("."):
        is_name = ".".join(parts) in _mappings_at(registry_revision())
        parts.append("*" if is_name or is_place(part) else part)
    return ".".join(parts)


@lru_cache(maxsize=1)
def _mappings_at(revision: int) -> frozenset[str]:
    """Returns the paths of the groups whose keys are names that the user chooses."""
    records: list[tuple[str, type[Record]]] = [("", Sections)]
    records += ((f"{path}.", record) for path, record in _walk_records(Sections, ""))
    fields = [(f"{path}{name}", field) for path, each in records for name, field in each.model_fields.items()]
    return frozenset(path for path, field in fields if get_origin(field.annotation) is dict)


def is_place(part: str) -> bool:
    """Returns whether a part of a path is an index of a list: `isdigit` alone accepts `²`."""
    return part.isascii() and part.isdigit() and len(part) <= _PLACE_DIGITS


def suggest_key(path: str) -> str:
    """Returns the existing key that an unknown one was probably meant to be, or an empty text.

    A key of the same group is named by its last word, one elsewhere by its whole path. No suggestion is
    better than a wrong one.
    """
    keys = all_keys()
    parent, _, leaf = pattern_of(path).rpartition(".")
    leaf = leaf.replace("-", "_").lower()
    prefix = f"{parent}." if parent else ""
    siblings = [
        key[len(prefix) :] for key in keys if key.startswith(prefix) and "." not in key[len(prefix) :]
    ]
    if ours := OUR_KEYS.get(leaf, "") if leaf not in siblings else "":
        return ours[len(prefix) :] if prefix and ours.rpartition(".")[0] == parent else ours
    if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=_NEAR):
        return near[0]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == leaf]
    return min(elsewhere, key=lambda key: (key.count("."), key)) if elsewhere else ""


def suggest_value(value: str, choices: Sequence[str], path: str = "") -> str:
    """Returns the allowed value that one that is not allowed was probably meant to be, or an empty text.

    It means the same elsewhere, is spelt nearly so, or one is the beginning of the other. Short words that
    differ in one letter, and words with other digits, mean different things: cpu is no misspelt gpu, and int8
    no int4.

    Args:
        value: The value.
        choices: Those that are allowed.
        path: Dotted path of the key, whose values may have other names elsewhere.
    """
    word = value.rpartition(".")[2].lower()
    if ours := our_value(path, word, choices):
        return ours
    lowered = {choice.lower(): choice for choice in choices if _digits(choice) in ("", _digits(word))}
    near = difflib.get_close_matches(word, lowered, n=1, cutoff=_NEAR_VALUE)
    within = sorted((choice for choice in lowered if _continues(word, choice)), key=len, reverse=True)
    beyond = [choice for choice in lowered if _continues(choice, word)]
    return next((lowered[choice] for choice in (*near, *within, *(beyond if len(beyond) == 1 else ()))), "")


def _digits(word: str) -> str:
    return "".join(filter(str.isdigit, word))


def _continues(word: str, beginning: str) -> bool:
    """Returns whether a word is another with more behind it, such as `cuda:0`."""
    return len(beginning) >= _WHOLE_WORD and word.startswith(beginning)


def _walk(record: type[Record], prefix: str) -> Iterator[Key]:
    for name, field in record.model_fields.items():
        path = f"{prefix}{name}"
        inner = list(_records_in(field.annotation))
        default = None if field.default is PydanticUndefined else field.default
        yield Key(
            path=path,
            description=field.description or "",
            expected=_describe_names(record, name) or ("a section" if inner else _describe(field)),
            default=default,
            required=field.is_required(),
            is_section=bool(inner),
            is_nullable=type(None) in get_args(field.annotation),
        )
        for inner_record, in_list in inner:
            yield from _walk(inner_record, f"{path}.*." if in_list else f"{path}.")


def _describe_names(record: type[Record], key: str) -> str:
    is_name = issubclass(record, Choice) and key == record.key
    if not is_name:
        return ""
    names = ", ".join(parts_of(record.slot))  # type: ignore[attr-defined]
    return f"one of {names or 'the parts of an extension, and none is loaded'}"


def _walk_records(record: type[Record], prefix: str) -> Iterator[tuple[str, type[Record]]]:
    for name, field in record.model_fields.items():
        for inner, in_list in _records_in(field.annotation):
            path = f"{prefix}{name}.*" if in_list else f"{prefix}{name}"
            yield path, inner
            yield from _walk_records(inner, f"{path}.")


def _records_in(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[Record], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Choice) and annotation.is_slot():
        # a slot without parts stands for itself: its keys exist, and only an extension adds a part
        records = annotation.records().values()
        # of a key that several parts have, that of the default part comes first
        default = annotation.records_by_default() if records else annotation
        yield default, in_list
        yield from ((record, in_list) for record in records if record is not default)
    elif isinstance(annotation, type) and issubclass(annotation, Record):
        yield annotation, in_list
    for inner in get_args(annotation):
        if get_origin(annotation) is not Literal:
            yield from _records_in(inner, in_list or get_origin(annotation) in (tuple, dict))


def _describe(field: FieldInfo) -> str:
    text, limits = _describe_type(field.annotation), _describe_limits(field.metadata)
    kind = text.removesuffix(_OR_NULL)
    return f"{kind}{limits}{text[len(kind) :]}"


def _describe_limits(metadata: Sequence[Any]) -> str:
    """Returns in words the limits of a type, with a space in front; empty where it has none."""
    limits = []
    for constraint in metadata:
        if isinstance(constraint, NameOf):
            limits.append(f"that is a name in {constraint.group}")
        if pattern := getattr(constraint, "pattern", None):
            limits.append(_PATTERNS[pattern])
        for name, sign in _BOUNDS.items():
            if (bound := getattr(constraint, name, None)) is not None:
                limits.append(f"{sign} {bound}")
        for name, words in _LENGTHS.items():
            if (bound := getattr(constraint, name, None)) is not None:
                limits.append(f"{words} {bound} long")
    return f" {' and '.join(limits)}" if limits else ""


def _describe_type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        names = next((each.names for each in inner if isinstance(each, NameIn)), None)
        if names is not None:
            return f"one of {', '.join(names)}"
        limits = [one for each in inner[1:] for one in getattr(each, "metadata", [each])]
        return _describe_type(inner[0]) + _describe_limits(limits)
    if origin is Literal:
        words = ["true" if item is True else "false" if item is False else str(item) for item in inner]
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin in (Union, types.UnionType):
        return " or ".join(_describe_type(item) for item in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, each {_describe_type(inner[0])}"
    if origin is tuple and len(set(inner)) > 1:
        return f"a list of {' and '.join(map(_describe_type, inner))}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {_describe_type(inner[0])}"
    return _SCALARS.get(annotation, "a section")
