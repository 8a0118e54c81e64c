"""Settings that name something else: a field, a condition, a network module, or a file of weights.

A part's record annotates its settings with these types, and so does an extension's. A rule checks the names,
`Kinds` what a field holds, and the content of a file of weights counts in the keys of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_args

from sat_train.config.parts.record import Record


@dataclass(frozen=True)
class NameOf:
    """Marks a text as the name of an entry of a group.

    Args:
        group: Dotted path of the mapping that holds the entry.
    """

    group: str


@dataclass(frozen=True, init=False)
class Kinds:
    """Marks the kinds that a named field may have: `Annotated[FieldName, Kinds("video", "image")]`."""

    kinds: tuple[str, ...]

    def __init__(self, *kinds: str) -> None:
        object.__setattr__(self, "kinds", kinds)


@dataclass(frozen=True)
class FileContent:
    """Marks a path whose content counts, not its name."""


FieldName = Annotated[str, NameOf("data.fields")]
ConditionName = Annotated[str, NameOf("model.conditions")]
ModuleName = Annotated[str, NameOf("model.modules")]
WeightsFile = Annotated[str, FileContent()]


class Reference(NamedTuple):
    """One setting that names something.

    Args:
        key: The setting; with an index, `fields.1`, where it holds several names.
        name: Its value.
        group: Dotted path of the group that holds the name; empty for a file of weights.
        kinds: Kinds that the field may have; empty for any.
    """

    key: str
    name: str
    group: str
    kinds: tuple[str, ...] = ()


def references_of(params: Record) -> Iterator[Reference]:
    """Yields the references among a part's settings; a setting that is null names nothing."""
    for key, field in type(params).model_fields.items():
        marks = [*field.metadata, *_marks(field.annotation)]
        groups = [each.group for each in marks if isinstance(each, NameOf)]
        groups += ["" for each in marks if isinstance(each, FileContent)]
        kinds = next((each.kinds for each in marks if isinstance(each, Kinds)), ())
        value = getattr(params, key)
        names = value if isinstance(value, tuple) else () if value is None else (value,)
        for index, name in enumerate(names if groups else ()):
            yield Reference(f"{key}.{index}" if isinstance(value, tuple) else key, name, groups[0], kinds)


def field_names(params: Record) -> tuple[str, ...]:
    """Returns the names of the fields that a part refers to, each once, sorted."""
    return tuple(sorted({each.name for each in references_of(params) if each.group == "data.fields"}))


def weights_files(params: Record) -> tuple[str, ...]:
    """Returns the paths of the files of weights that a part refers to, each once, sorted."""
    return tuple(sorted({each.name for each in references_of(params) if not each.group}))


def _marks(annotation: Any) -> Iterator[Any]:
    for each in get_args(annotation):
        if isinstance(each, (NameOf, Kinds, FileContent)):
            yield each
        yield from _marks(each)
