"""`resolved.yaml`: every value of a run with where it came from. It loads back to the same configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat_train.config.layers import DEFAULT
from sat_train.config.run import RunConfig

_COMMENT_COLUMN = 56


def render_resolved(run: RunConfig) -> str:
    """Returns the YAML text of a configuration, each value followed by its source as a comment."""
    head = f"# Every value of this run and where it came from. Digest {run.digest()}\n"
    return head + "\n".join(_render(run.tree(), run.sources, "", 0)) + "\n"


def write_resolved(run: RunConfig, path: Path) -> None:
    """Writes `render_resolved` to a file.

    Ranks: rank 0 only.
    """
    path.write_text(render_resolved(run), encoding="utf-8")


def _render(value: Any, sources: Mapping[str, str], path: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = f"{path}.{key}" if path else str(key)
        label = f"{indent}{key}:" if isinstance(value, dict) else f"{indent}-"
        if _is_group(item):
            yield label
            yield from _render(item, sources, inner, depth + 1)
        else:
            # JSON is YAML, and leaves no doubt about types: 1e-08 stays a number, "1" a text
            yield (
                f"{label} {json.dumps(item, ensure_ascii=False)}".ljust(_COMMENT_COLUMN)
                + f" # {sources.get(inner, DEFAULT)}"
            )


def _is_group(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
    )
