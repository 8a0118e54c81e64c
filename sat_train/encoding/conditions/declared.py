"""Inputs that a condition's `encode` may read: its declarations are the cache key, so they are enforced.

A condition that reads more than it declares would be read from the cache where it should be encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from sat_train.data.batches import VideoSample
from sat_train.errors import SatTrainError
from sat_train.models.encoders import Encoders

# inputs of `encode` by the declaration that puts them into the key
_SAMPLE = {
    "generator": "augments",
    "augmentation": "augments",
    "training": "augments",
    "caption": "reads_caption",
}
_ENCODERS = dict.fromkeys(("text", "texts", "text_encoder", "empty_prompt"), "encodes_text")
_NEVER = ("sample_index",)  # two samples of one clip have the same encoding


class Declares(Protocol):
    """The declarations of a condition that its cache key follows."""

    name: str
    augments: bool
    reads_caption: bool
    encodes_text: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that it may read."""


class DeclaredInputs:
    """A sample, or the encoders, of which only what a condition declares can be read.

    Args:
        inputs: The sample or the encoders.
        condition: The condition that reads them.
        needs: By attribute, the declaration that allows it.
    """

    def __init__(self, inputs: Any, condition: Declares, needs: Mapping[str, str]) -> None:
        self._inputs, self._condition, self._needs = inputs, condition, needs

    def __getattr__(self, name: str) -> Any:
        declaration = self._needs.get(name)
        if name in _NEVER or (declaration and not getattr(self._condition, declaration)):
            remedy = f"{declaration} = True in its class" if declaration else "read another attribute"
            raise SatTrainError(
                f"condition '{self._condition.name}': encode reads `{name}`, which its cache key leaves out",
                expected="an encode that reads what the condition declares",
                remedy=remedy,
            )
        value = getattr(self._inputs, name)
        return DeclaredFields(value, self._condition) if name == "fields" else value


class DeclaredFields(Mapping[str, Any]):
    """The fields of a sample that the settings of a condition name.

    Args:
        fields: All fields of the sample.
        condition: The condition that reads them.
    """

    def __init__(self, fields: Mapping[str, Any], condition: Declares) -> None:
        self._fields, self._condition = fields, condition

    def __getitem__(self, name: str) -> Any:
        about = f"condition '{self._condition.name}'"
        if name not in self._condition.fields:
            raise SatTrainError(
                f"{about}: encode reads the field '{name}', which its cache key leaves out",
                expected="a setting of type FieldName that holds this name",
                remedy="declare it in the condition's parameter record",
            )
        if name not in self._fields:
            raise SatTrainError(
                f"{about}: this sample has no field '{name}'",
                expected=f"a value of data.fields.{name} for each sample, and for each prompt when sampling",
                remedy="give the field, or leave the condition out of model.conditions",
            )
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._condition.fields if name in self._fields)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def declared_sample(sample: VideoSample, condition: Declares) -> VideoSample:
    """Returns a sample of which `encode` can read what its condition declares."""
    declared: Any = DeclaredInputs(sample, condition, _SAMPLE)
    return declared  # type: ignore[no-any-return]


def declared_encoders(encoders: Encoders, condition: Declares) -> Encoders:
    """Returns encoders of which `encode` can call what its condition declares."""
    declared: Any = DeclaredInputs(encoders, condition, _ENCODERS)
    return declared  # type: ignore[no-any-return]
