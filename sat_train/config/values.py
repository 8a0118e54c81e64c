"""Values of any type: their display, and those that cannot be written and read back unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

COMMAND_LINE = "command line"  # source of a value, besides the names of files
_LARGEST = 2**63 - 1  # of integers that torch, DeepSpeed and JSON's readers keep exactly


def unusable(value: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields each value of a tree that cannot be read back: its path, its display, and the expectation."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from unusable(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unusable(item, f"{path}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, str(value), "a finite number"
    elif isinstance(value, int) and abs(value) > _LARGEST:
        yield path, f"a number of {value.bit_length()} bits", "a whole number below 2^63"
    elif isinstance(value, str) and not _is_text(value):
        yield path, value, "text in UTF-8 without NUL characters"


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a tree with every text in it changed; keys stay."""
    if isinstance(value, dict):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def show_value(value: Any) -> str:
    """Returns a value in YAML's notation."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def show_rate(value: float) -> str:
    """Returns a rate in short form: 1e-5, 0.001."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def show_figure(value: float) -> str:
    """Returns a computed figure with three digits, or whole: 0.0251, 3.42, 1,655."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show_duration(seconds: float) -> str:
    """Formats a duration in its two largest units, rounded up: 3m, 1h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    minutes = math.ceil(seconds / 60)
    if seconds < 60:
        return f"{math.ceil(seconds)}s"
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode("utf-8")
    except UnicodeEncodeError:
        return False
