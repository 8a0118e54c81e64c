"""What a rule between settings is: the keys it reads, and the faults it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sat_train.config.model_spec import ModelSpec, build_model_spec
from sat_train.config.schema.args import ArgsConfig
from sat_train.config.schema.data_section import DataConfig
from sat_train.config.schema.deepspeed import DeepSpeedConfig
from sat_train.config.schema.model_section import ModelConfig
from sat_train.config.values import show_value
from sat_train.errors import Fault

Purpose = Literal["train", "sample", "precompute", "check"]


@dataclass(frozen=True)
class ParsedConfig:
    """Settings that are each right by themselves.

    Args:
        args: Section `args`.
        model: Section `model`.
        data: Section `data`.
        deepspeed: Section `deepspeed`.
        purpose: What the run is for.
        source_of: Gives the file a key came from.
    """

    args: ArgsConfig
    model: ModelConfig
    data: DataConfig | None
    deepspeed: DeepSpeedConfig
    purpose: Purpose
    source_of: Callable[[str], str]

    @cached_property
    def spec(self) -> ModelSpec:
        """The numbers of the model."""
        return build_model_spec(self.model)

    def value(self, path: str) -> Any:
        """Returns the value of a dotted key; None where a group on the way is null or has no such key."""
        node: Any = self
        for part in path.split("."):
            node = node[int(part)] if isinstance(node, tuple) else getattr(node, part, None)
        return node

    def fault(self, path: str, value: object, expected: str, suggestion: str = "") -> Fault:
        """Returns a fault at a key, with the file that the key came from."""
        shown = show_value(list(value) if isinstance(value, tuple) else value)
        return Fault(path, shown, expected, self.source_of(path), suggestion)


@dataclass(frozen=True)
class Rule:
    """One check between settings.

    Args:
        reads: Keys or groups it depends on; with a fault in one of them it cannot be checked.
        check: Yields the faults.
    """

    reads: tuple[str, ...]
    check: Callable[[ParsedConfig], Iterator[Fault]]

    def can_be_checked(self, faulty: set[str]) -> bool:
        """Tells whether nothing that the rule reads is a fault already."""
        return not any(
            path == read or path.startswith(f"{read}.") or read.startswith(f"{path}.")
            for path in faulty
            for read in self.reads
        )


def rule(*reads: str) -> Callable[[Callable[[ParsedConfig], Iterator[Fault]]], Rule]:
    """Makes a rule of a function; the arguments are the keys it reads."""
    return lambda check: Rule(reads, check)
