"""A rule between settings: the keys it reads, and the faults it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sat_train.config.facts import RunFacts
from sat_train.config.parts.registry import register_check
from sat_train.config.run import SectionRecords
from sat_train.config.values import show_value
from sat_train.errors import Fault

Purpose = Literal["train", "sample", "precompute", "check"]


@dataclass(frozen=True)
class ParsedConfig(SectionRecords):
    """Settings that are each valid by themselves.

    Args:
        purpose: Training or sampling.
        source_of: Returns the file a key came from.
        facts: What is known of the run besides, once it starts.
    """

    purpose: Purpose
    source_of: Callable[[str], str]
    facts: RunFacts = field(default_factory=RunFacts)

    def value(self, path: str) -> Any:
        """Returns the value of a dotted key; None where a group on the way is null or has no such key."""
        node: Any = self
        for part in path.split("."):
            node = node[int(part)] if isinstance(node, tuple) else getattr(node, part, None)
        return node

    def fault(self, path: str, value: object, expected: str, suggestion: str = "") -> Fault:
        """Returns a fault at a key, with the file that the key came from."""
        text = show_value(list(value) if isinstance(value, tuple) else value)
        return Fault(path, text, expected, self.source_of(path), suggestion)


@dataclass(frozen=True)
class Rule:
    """A check between settings.

    Args:
        reads: Keys or groups it depends on; it is not checked when one of them has a fault. `facts.NAME` is
            a field of `RunFacts`.
        check: Yields the faults.
        severity: `error` refuses the configuration; `warning` is shown, unless `args.silence` names the rule.
        source: Reference that explains the reason; shown with its faults.
        looks_at_paths: It needs the files that the configuration names.
    """

    reads: tuple[str, ...]
    check: Callable[[ParsedConfig], Iterator[Fault]]
    severity: Literal["error", "warning"] = "error"
    source: str = ""
    looks_at_paths: bool = False

    @property
    def name(self) -> str:
        """Name of the rule, by which a warning can be silenced."""
        return self.check.__name__

    @property
    def reads_facts(self) -> bool:
        """True where it has something to say only when a run starts."""
        return any(read.startswith("facts.") for read in self.reads)

    def can_be_checked(self, faulty: set[str]) -> bool:
        """Returns whether all keys that the rule reads are valid."""
        return not any(
            path == read or path.startswith(f"{read}.") or read.startswith(f"{path}.")
            for path in faulty
            for read in self.reads
        )


def rule(
    *reads: str,
    severity: Literal["error", "warning"] = "error",
    source: str = "",
    looks_at_paths: bool = False,
) -> Callable[[Callable[[ParsedConfig], Iterator[Fault]]], Rule]:
    """Registers a function as a rule under its own name; extensions know it as a guard rail.

    Args:
        reads: Keys or groups that it reads, such as `args.lr`.
        severity: See `Rule`.
        source: See `Rule`.
        looks_at_paths: See `Rule`.

    Raises:
        ValueError: The name is taken.
    """

    def register(check: Callable[[ParsedConfig], Iterator[Fault]]) -> Rule:
        registered = Rule(reads, check, severity, source, looks_at_paths)
        register_check(registered.name, check, registered)
        return registered

    return register
