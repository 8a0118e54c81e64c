"""Base record of all sections, and the few types that YAML needs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

FILE_NAME = r"^[\w-][\w.-]*$"
PLAIN_NAME = r"^[A-Za-z]\w*$"
_EXACT_FLOAT = 2**53  # above it a float is not every whole number


class Record(BaseModel):
    """A frozen group of settings, without silent conversions and without unknown keys."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


def list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _whole_float_to_int(value: Any) -> Any:
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT
    return int(value) if is_whole else value


def _one_to_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else list_to_tuple(value)


def _one_number_to_tuple(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (value,) if is_number else list_to_tuple(value)


def _pairs_to_tuple(value: Any) -> Any:
    """Turns a mapping, whose keys are names without dots, or a list of lists into pairs."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(map(list_to_tuple, value)) if isinstance(value, list) else value


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("literal_error", "true is not 1, and false is not 0")
    return value


def false_to_off(value: Any) -> Any:
    """Turns YAML's false back into `off`: without quotes it is a truth value."""
    return "off" if value is False else value


def _truth_to_policy(value: Any) -> Any:
    return {True: "full", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _truth_to_switch(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _base_60_to_aspect(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{value // 60}:{value % 60}" if is_number else value


# YAML has lists only; a frozen record holds tuples.
Ints = Annotated[tuple[int, ...], BeforeValidator(list_to_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(list_to_tuple)]
Sizes = Annotated[
    tuple[Annotated[tuple[int, int], BeforeValidator(list_to_tuple)], ...], BeforeValidator(list_to_tuple)
]
HeightWidth = Annotated[tuple[int, int], BeforeValidator(list_to_tuple)]
TwoFloats = Annotated[tuple[float, float], BeforeValidator(list_to_tuple)]
Betas = TwoFloats
Betas3 = Annotated[tuple[float, float, float], BeforeValidator(list_to_tuple)]
# One text may stand for a list of one.
Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(_one_to_tuple),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
# One number may stand for a list of one.
Numbers = Annotated[
    tuple[float, ...],
    BeforeValidator(_one_number_to_tuple),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}),
]
# Pairs of a pattern and a number, the first match of which counts; a mapping where the patterns are names.
_PAIRS = WithJsonSchema(
    {
        "anyOf": [
            {"type": "object", "additionalProperties": {"type": "number"}},
            {"type": "array", "items": {"type": "array", "minItems": 2, "maxItems": 2}},
        ]
    }
)
PatternRanks = Annotated[
    tuple[tuple[str, Annotated[int, Field(ge=1)]], ...], BeforeValidator(_pairs_to_tuple), _PAIRS
]
PatternAlphas = Annotated[
    tuple[tuple[str, Annotated[float, Field(gt=0)]], ...], BeforeValidator(_pairs_to_tuple), _PAIRS
]
# `16:9` without quotes is a number to base 60 in YAML.
Aspects = Annotated[
    tuple[Annotated[str, BeforeValidator(_base_60_to_aspect)], ...], BeforeValidator(list_to_tuple)
]
# `3.` and `1e9` are whole numbers that YAML reads as floats.
Whole = Annotated[int, BeforeValidator(_whole_float_to_int)]
# A number is not a text: `0123` is 83 in YAML, and `1_000` is 1000. In quotes it stays as written.
Text = str
# Part of a file's name: nothing that leaves its folder, hides it or breaks a line.
FileName = Annotated[str, Field(pattern=FILE_NAME)]
# Key of a mapping, which is a part of a dotted path.
PlainName = Annotated[str, Field(pattern=PLAIN_NAME)]
Recompute = Literal["off", "gemm", "attention", "full"]
# CogVideo's files have a truth value here.
RecomputeChoice = Annotated[
    Literal["auto", "off", "gemm", "attention", "full"],
    BeforeValidator(_truth_to_policy),
    WithJsonSchema({"enum": ["auto", "off", "gemm", "attention", "full", True, False]}),
]
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(_truth_to_switch),
    WithJsonSchema({"enum": ["auto", "on", "off", True, False]}),
]
Quantization = Annotated[Literal["off", "int8", "nf4"], BeforeValidator(false_to_off)]
# Pydantic by itself accepts true as 1 and false as 0.
ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_truth_value)]
