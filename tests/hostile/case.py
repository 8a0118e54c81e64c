"""One hostile input, and what must not come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PORT_MARK = "{port}"
# Stands in the environment of each case and in the file that must not be read.
SECRET = "hunter2-secret-token"


@dataclass(frozen=True)
class Field:
    """Where a case may play.

    Args:
        inside: The folder that the person looks at; the case writes its files here.
        outside: What must be neither read nor written: `secret.txt`, `victim.txt`; a payload that runs leaves
            `executed` here.
        port: Of a server on this machine that counts who connects.
    """

    inside: Path
    outside: Path
    port: int

    @property
    def secret(self) -> Path:
        return self.outside / "secret.txt"

    @property
    def victim(self) -> Path:
        return self.outside / "victim.txt"

    @property
    def executed(self) -> Path:
        return self.outside / "executed"


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Args:
        name: What it is; unique.
        make: Writes the files of the case and returns the words after `sat-train`.
        codes: Exit codes that are right. 0 only where the input is harmless once it is handled, such as a
            name with terminal escapes.
        reads_secret: The person asked for the file outside by name, so that reading it is no fault.
        opens_nothing: Nobody asked for any file outside: opening one is a fault, whatever becomes of it.
    """

    name: str
    make: Callable[[Field], list[str]]
    codes: tuple[int, ...] = (2,)
    reads_secret: bool = False
    opens_nothing: bool = False
