"""Reads frozen records from JSON that anybody may have written: every field, type and bound is checked."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=0, le=2**62)]
RankCount = Annotated[int, Field(gt=0, le=2**16)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
NonEmpty = Annotated[str, Field(min_length=1)]


class JsonRecord:
    """Base of the dataclasses that are read from JSON: nothing is converted, and no field is unknown."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def read_record(kind: Any, text: str | bytes) -> Any:
    """Returns the record that a JSON text holds.

    Args:
        kind: A `JsonRecord`, or a type of several, such as `dict[str, Record]`.
        text: The text.

    Raises:
        ValueError: It is not JSON, or a field is missing, unknown, of another type or out of its bounds.
    """
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValueError(_describe(error)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"{path} is unknown"
    return f"{path} = {first['input']!r:.40}" if path else first["msg"]
