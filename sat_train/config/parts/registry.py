"""The registry of parts: the names that YAML may use in each slot, with the parameters of each.

A slot is a key of the configuration where YAML names one of several parts, such as the optimizer. A part is
a record of parameters, registered under a name, and a builder elsewhere that is imported when the part is
first built. Schema, `--explain`, `configs/schema.json` and messages are all derived from here.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_origin

from pydantic import Field as Field
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, create_model
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from sat_train.config.parts.record import Record
from sat_train.errors import LaunchError

_NAME = re.compile(r"[A-Za-z]\w*")


class Params(Record):
    """Settings of a part: frozen, strict, unknown keys refused.

    Its docstring and the descriptions of its fields are its documentation.
    """

    def check(self, model: Any) -> Iterable[tuple[str, str]]:
        """Yields the key and the expectation for each value that does not fit the model.

        They join the other faults of the configuration.

        Args:
            model: The `ModelSpec`: numbers and geometry of the model.
        """
        return ()


P = TypeVar("P", bound=type[Params])


@dataclass(frozen=True)
class RegisteredPart:
    """A record of parameters under its name in a slot, and its builder.

    Args:
        slot: The slot, such as `optimizer`.
        name: Its name in YAML.
        params: Record of its parameters.
        build: `module:callable`, absolute.
    """

    slot: str
    name: str
    params: type[Params]
    build: str

    def builder(self) -> Callable[..., Any]:
        """Imports the builder.

        Raises:
            LaunchError: There is no such callable.
        """
        module, _, name = self.build.partition(":")
        try:
            return cast("Callable[..., Any]", getattr(import_module(module), name))
        except (ImportError, AttributeError) as error:
            raise LaunchError(
                f"the {self.slot} '{self.name}' cannot be built: {error}",
                expected=f"{self.build}, as {self.params.__module__} registers it",
            ) from error


_PARTS: dict[tuple[str, str], RegisteredPart] = {}
_SLOTS: dict[str, type[Choice]] = {}
_CHECKS: dict[str, tuple[str, object]] = {}  # module and check, by name
_revisions = [0]


def part(slot: str, name: str, *, build: str) -> Callable[[P], P]:
    """Registers a record of parameters under a name for YAML.

    Args:
        slot: One of the slots of `docs/extend_reference.md`, such as `optimizer`.
        name: What YAML writes. Must be new in its slot.
        build: `module:callable`, imported at the first build and never by `sat-train check`. `.parts:Lion`
            is relative to the package of the record, `:build` is in the record's own module. It is called
            with the parameters, and with the arguments of the slot.

    Raises:
        ValueError: The slot does not exist, the name is taken or the record is undocumented.
    """

    def register(params: P) -> P:
        module, colon, function = build.partition(":")
        _check_part(slot, name, params, is_target=bool(colon and function))
        if not module:
            module = params.__module__
        elif module.startswith("."):
            module = (
                getattr(sys.modules[params.__module__], "__package__", "") or params.__module__
            ) + module
        _PARTS[slot, name] = RegisteredPart(slot, name, params, f"{module}:{function}")
        _revisions[0] += 1
        return params

    return register


def _check_part(slot: str, name: str, params: type[Params], *, is_target: bool) -> None:
    choice = _SLOTS.get(slot)
    if choice is None:
        near = difflib.get_close_matches(slot, _SLOTS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"there is no slot '{slot}', but {', '.join(sorted(_SLOTS))}{hint}")
    if (slot, name) in _PARTS:
        other = _PARTS[slot, name].params
        raise ValueError(f"the {slot} '{name}' is registered already, by {other.__module__}")
    base = choice.base or choice.model_fields["params"].annotation
    if not (isinstance(params, type) and issubclass(params, cast("type[Params]", base))):
        raise ValueError(f"the record of {slot} '{name}' must derive from {base}")
    silent = [
        key for key, field in params.model_fields.items() if not (field.description or "").endswith(".")
    ]
    if not params.__doc__ or silent:
        what = f"descriptions (with a full stop) for {', '.join(silent)}" if silent else "a docstring"
        raise ValueError(f"the record of {slot} '{name}' needs {what}")
    if choice.base is not None and choice.key in params.model_fields:
        raise ValueError(f"the record of {slot} '{name}' cannot have a setting '{choice.key}'")
    if not _NAME.fullmatch(name) or not is_target:
        raise ValueError(f"{slot} '{name}' needs a plain name and build='module:callable'")


def slot_names() -> list[str]:
    """Returns the names of all slots."""
    return sorted(_SLOTS)


def parts_of(slot: str) -> dict[str, RegisteredPart]:
    """Returns the parts of a slot by name, sorted."""
    return {name: each for (place, name), each in sorted(_PARTS.items()) if place == slot}


def remove_parts(module: str) -> None:
    """Removes the parts that a module or package has registered."""
    for key in [key for key, each in _PARTS.items() if f"{each.params.__module__}.".startswith(f"{module}.")]:
        del _PARTS[key]
    for name in [name for name, (of, _) in _CHECKS.items() if f"{of}.".startswith(f"{module}.")]:
        del _CHECKS[name]
    _revisions[0] += 1


def register_check(name: str, function: Callable[..., Any], check: object) -> None:
    """Registers a check between settings, by the name and for the module of a function.

    Raises:
        ValueError: The name is taken.
    """
    if name in _CHECKS:
        raise ValueError(f"the guard rail '{name}' is registered already, by {_CHECKS[name][0]}")
    _CHECKS[name] = (function.__module__, check)


def registered_checks() -> list[Any]:
    """Returns the registered checks, in their order."""
    return [check for _, check in _CHECKS.values()]


def registry_revision() -> int:
    """Returns a number that changes with every registration: the key of caches derived from the parts."""
    return _revisions[0]


class Choice(Record):
    """A group of settings in which YAML names a part: the base of each slot's record.

    A subclass sets `slot`, the name of the slot, and `key`, the key that holds the part's name; its field
    `params` is annotated with the record that all parts of the slot derive from. Where the settings stand
    next to the key, without `params`, that record is `base`. Reading YAML returns an instance of a subclass
    that is created for the part.
    """

    slot: ClassVar[str]
    key: ClassVar[str] = "target"
    base: ClassVar[type[Params] | None] = None
    if TYPE_CHECKING:  # a field of each subclass, behind the key
        params: Params

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if cls.is_slot():
            _SLOTS[cls.slot] = cls

    @classmethod
    def is_slot(cls) -> bool:
        """Returns whether this is a slot's record, and neither the base of all nor the record of one part."""
        return hasattr(cls, "slot") and get_origin(cls.model_fields[cls.key].annotation) is not Literal

    @classmethod
    def records(cls) -> dict[str, type[Choice]]:
        """Returns the record of each registered part, by name."""
        return {name: _record_of(cls, each) for name, each in parts_of(cls.slot).items()}

    @classmethod
    def default(cls) -> Any:
        """Returns the part that is used where YAML names none."""
        return cls._choose({})

    @classmethod
    def of(cls, name: str, params: dict[str, Any]) -> Any:
        """Returns the part with this name and these settings."""
        return cls._choose({cls.key: name, **(params if cls.base else {"params": params})})

    @property
    def settings(self) -> Params:
        """The settings of the part, wherever they stand."""
        return cast("Params", self) if self.base else self.params

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the part from its parameters and the arguments of its slot."""
        builder = _PARTS[self.slot, getattr(self, self.key)].builder()
        return builder(self.settings, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        slot = next(each for each in type(self).__mro__ if issubclass(each, Choice) and each.is_slot())
        return slot._choose, (self.model_dump(),)  # this class is made, and has no name to import

    @classmethod
    def _choose(cls, value: Any) -> Any:
        field, records = cls.model_fields[cls.key], cls.records()
        if isinstance(value, cls):
            return value
        if not records:
            settings = value if isinstance(value, dict) else {}
            raise _refused(cls, settings, "the parts of an extension, and none is loaded")
        if not isinstance(value, dict):
            return cls.records_by_default().model_validate(value)
        name = value.get(cls.key, None if field.is_required() else field.default)
        record = records.get(name) if isinstance(name, str) else None
        if record is None:
            raise _refused(cls, value, ", ".join(records))
        return record.model_validate(value)

    @classmethod
    def records_by_default(cls) -> type[Choice]:
        """Returns the record of the default part, or of the first one."""
        records = cls.records()
        return records.get(str(cls.model_fields[cls.key].default)) or next(iter(records.values()))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.is_slot():
            return handler(source)
        return core_schema.no_info_plain_validator_function(cls._choose)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if not cls.is_slot():
            return handler(schema)
        records = [handler(record.__pydantic_core_schema__) for record in cls.records().values()]
        return {"anyOf": records} if records else {"type": "object"}


@dataclass(frozen=True)
class NameIn:
    """Annotation of a text that names a part of a slot away from the slot itself, such as `args.sampler`.

    Args:
        choice: The slot's record.
    """

    choice: type[Choice]

    @property
    def names(self) -> list[str]:
        """The names that may stand there."""
        return list(parts_of(self.choice.slot))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": self.names, "type": "string"}

    def _check(self, name: str) -> str:
        if name not in self.names:
            raise PydanticCustomError("literal_error", "a name of the slot")
        return name


def _refused(choice: type[Choice], value: dict[str, Any], names: str) -> ValidationError:
    is_missing = choice.key not in value
    error = InitErrorDetails(
        type="missing" if is_missing else "literal_error",
        loc=(choice.key,),
        input=value.get(choice.key),
        ctx={} if is_missing else {"expected": names},
    )
    return ValidationError.from_exception_data(choice.__name__, [error])


@cache
def _record_of(choice: type[Choice], each: RegisteredPart) -> type[Choice]:
    key, params = choice.model_fields[choice.key], each.params
    is_complete = not any(field.is_required() for field in params.model_fields.values())
    fields: dict[str, Any] = {
        choice.key: (
            Literal[each.name],  # type: ignore[name-defined]
            Field(each.name if key.default == each.name else ..., description=key.description),
        )
    }
    if choice.base is None:
        fields["params"] = (params, Field(params() if is_complete else ..., description="Its settings."))
    bases: Any = choice if choice.base is None else (params, choice)
    name = f"{each.name}{choice.__name__}"
    return cast("type[Choice]", create_model(name, __base__=bases, __doc__=params.__doc__, **fields))


def choices_in(value: Any, path: str = "") -> Iterator[tuple[str, Choice]]:
    """Yields each part that a configuration names, with its dotted path."""
    if isinstance(value, Choice):
        yield path, value
    if isinstance(value, Record):
        items: Any = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, tuple) else ()
    for name, item in items:
        if isinstance(item, (Record, dict, tuple)):
            yield from choices_in(item, f"{path}.{name}" if path else str(name))
