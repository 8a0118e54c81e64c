"""Errors that a user can cause. Each names the place, the value, the expectation and the remedy.

Bugs of this project are an `assert` instead. Only `sat_train.cli` turns these errors into exit codes.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_LAYOUT = "\n\t"
_HIDDEN = "***"
_PASSWORD = re.compile(r"(://(?:[^/\s:@]*:)?)[^/\s]*@")
_SIGNATURE = re.compile(
    r"([?&;][\w.-]*(?:sig|signature|token|secret|passw|pwd|credential|access_?key|api_?key|keyid)[\w.-]*=)"
    r"[^&;#\s\"']+",
    re.IGNORECASE,
)
_SHOWN_VALUE = 160


def without_secrets(text: str) -> str:
    """Hides the passwords in URLs and the signatures of presigned URLs."""
    if "://" not in text:
        return text
    return _SIGNATURE.sub(rf"\1{_HIDDEN}", _PASSWORD.sub(rf"\1{_HIDDEN}@", text))


def printable(text: str) -> str:
    """Returns a text that is safe to show: control characters, which a terminal would obey, are escaped.

    Passwords and signatures in URLs are hidden, because logs and screens are shared. Line breaks, tabs and
    spaces of all scripts are kept. Lone surrogates, which no stream can encode, are escaped too, and so are
    the marks that change the direction of writing, which can make a name look like another one.
    """
    text = without_secrets(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _is_harmless(character) else _escaped(character) for character in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _LAYOUT or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class SatTrainError(Exception):
    """Base class of all errors that a user can cause and correct.

    Args:
        problem: One sentence that names the key or path and the value there.
        expected: Description of a correct value.
        remedy: Advice for the user.
    """

    exit_code = 2
    ranks_agree = False  # whether all ranks raise the same error, so that only rank 0 shows it

    def __init__(self, problem: str, *, expected: str = "", remedy: str = "") -> None:
        self.problem = problem
        self.expected = expected
        self.remedy = remedy
        lines = [problem]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  remedy:   {remedy}")
        super().__init__(printable("\n".join(lines)))


@dataclass(frozen=True)
class Fault:
    """One fault of a configuration.

    Args:
        path: Dotted key, e.g. `args.train_iters`.
        value: The value, shown as text; an empty text if the key is missing.
        expected: Description of a correct value.
        source: File, or `command line`, that the value came from; empty if unknown.
        suggestion: The nearest key or value that exists; empty if there is none.
    """

    path: str
    value: object
    expected: str
    source: str = ""
    suggestion: str = ""

    def __str__(self) -> str:
        path, value = _shorten(self.path), _shorten(str(self.value))
        setting = f"{path} = {value}" if value else path
        parts = [f"{setting}: expected {self.expected}"]
        if self.suggestion:
            parts[0] += f"; did you mean '{self.suggestion}'?"
        if self.source:
            parts.append(f"[{self.source}]")
        return " ".join(parts)


def _shorten(text: str) -> str:
    """Returns a text on one line, truncated; hides secrets first, while URLs are still whole."""
    line = without_secrets(text).replace("\n", "\\n").replace("\r", "\\r")
    return line if len(line) <= _SHOWN_VALUE else f"{line[: _SHOWN_VALUE - 3]}..."


class ConfigError(SatTrainError):
    """Faults in the YAML files or on the command line, all of them at once."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  - {fault}" for fault in faults)]))


class LaunchError(SatTrainError):
    """A run cannot start: lost processes, a run directory that cannot be written, a missing package."""


class DataError(SatTrainError):
    """A clip, caption, manifest or cache is missing or unreadable."""


class CheckpointError(SatTrainError):
    """Weights or a checkpoint are missing, torn, of another shape, or cannot be written."""


class TrainingError(SatTrainError):
    """Training cannot continue: non-finite loss, a lost rank."""

    exit_code = 1


class Stopped(BaseException):
    """A signal has ended the work in order. Not an `Exception`, so that nothing on the way swallows it.

    Args:
        signal_number: The signal.
        message: The last line on the screen: what was saved, and how to resume.
        ranks_agree: Whether all ranks raise the same one, so that only rank 0 shows it.
    """

    def __init__(self, signal_number: int, message: str, *, ranks_agree: bool = False) -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.ranks_agree = ranks_agree
        super().__init__(printable(message))
