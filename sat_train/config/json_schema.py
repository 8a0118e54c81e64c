"""`configs/schema.json`: the JSON schema with which editors complete and check the YAML files."""

from __future__ import annotations

import json
from typing import Any

from sat_train.config.run import Sections

_BASE = {
    "description": "Files that are merged before this one, relative to it.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def render_json_schema() -> str:
    """Returns the JSON schema of one YAML file, in which no key is required: a file may hold any part."""
    schema = _without_required(Sections.model_json_schema())
    schema["properties"] = {"base": _BASE, **schema["properties"]}
    schema["title"] = "sat_train"
    schema["description"] = "A part of the configuration of a run."
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _without_required(value: Any) -> Any:
    if isinstance(value, dict):
        items = {key: item for key, item in value.items() if not _is_required_list(key, item)}
        return {key: _without_required(item) for key, item in items.items()}
    return [_without_required(item) for item in value] if isinstance(value, list) else value


def _is_required_list(key: str, item: Any) -> bool:
    return key == "required" and isinstance(item, list)
