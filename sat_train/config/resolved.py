"""`resolved.yaml`: every value of a run with its source. It loads back to the same configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_train.config.layers import DEFAULT
from sat_train.config.run import RunConfig
from sat_train.files import write_text

_COMMENT_COLUMN = 56
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def render_resolved(config: RunConfig) -> str:
    """Returns the YAML text of a configuration, each value followed by its source as a comment."""
    head = f"# Every value of this run and where it came from. Digest {config.digest()}\n"
    return head + "\n".join(_render(config.tree(), config.sources, "", 0)) + "\n"


def write_resolved(config: RunConfig, path: Path, *, notes: Sequence[str] = ()) -> None:
    """Writes `render_resolved` to a file atomically.

    Where a URL in it has a password, only the owner may read the file.

    Args:
        notes: Comment lines at its head, such as the settings that a resumed run has changed.

    Raises:
        OSError: It cannot be written.

    Ranks: rank 0 only.
    """
    comments = "".join(f"# {' '.join(note.split())}\n" for note in notes)
    holds_secrets = config.shown_tree() != config.tree()
    write_text(path, comments + render_resolved(config), mode=0o600 if holds_secrets else 0o666)


def _render(value: Any, sources: Mapping[str, str], path: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        inner = f"{path}.{key}" if path else str(key)
        label = f"{indent}{key}:" if isinstance(value, dict) else f"{indent}-"
        if _is_group(item):
            yield label
            yield from _render(item, sources, inner, depth + 1)
        else:
            source = json.dumps(sources.get(inner, DEFAULT), ensure_ascii=False)[1:-1]
            yield f"{label} {_scalar(item)}".ljust(_COMMENT_COLUMN) + f" # {_escape(source)}"


def _scalar(value: Any) -> str:
    """Returns JSON, which is YAML with unambiguous types: 1e-08 stays a number, "1" a text."""
    return _escape(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _escape(text: str) -> str:
    """Escapes characters that JSON allows and YAML does not: controls, and line ends of other scripts."""
    return _NOT_IN_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _is_group(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
    )
