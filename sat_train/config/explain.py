"""Views of a configuration: all values with their sources, or one key explained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sat_train.config.catalog import (
    Key,
    all_keys,
    entry_of_mapping,
    keys_of_targets,
    pattern_of,
    suggest_key,
    target_names,
)
from sat_train.config.fixed_keys import only_value
from sat_train.config.layers import DEFAULT
from sat_train.config.legacy import reason_without_effect
from sat_train.config.loading import leaves
from sat_train.config.paths import shorten_assets
from sat_train.config.run import RunConfig
from sat_train.errors import ConfigError, Fault

_MODEL_FILES = "configs/model/"


def list_values(config: RunConfig, *, with_defaults: bool = True) -> str:
    """Returns one line for each value: key, value, source.

    Args:
        with_defaults: Include values that no file sets, and those of the shipped model file.
    """
    values = {
        path: _show(value)
        for path, value in leaves(config.shown_tree()).items()
        if with_defaults or not _is_untouched(config.sources[path])
    }
    if not values:
        return "everything is a default"
    key_width = max(map(len, values))
    value_width = min(max(map(len, values.values())), 40)
    lines = [
        f"{path.ljust(key_width)}  {text.ljust(value_width)}  {config.sources[path]}"
        for path, text in values.items()
    ]
    return "\n".join(lines)


def explain_key(path: str, config: RunConfig | None) -> str:
    """Returns the description of a key, its allowed values, its default, and its value and source in a run.

    Args:
        path: Dotted key, e.g. `args.lr`; a group lists its keys.
        config: The run whose value is shown; None shows none.

    Raises:
        ConfigError: There is no such key.
    """
    keys = all_keys() if config is None else keys_of_targets(path, leaves(config.shown_tree()))
    key = keys.get(pattern_of(path))
    if why := reason_without_effect(path):
        return f"{path}\n  A key of older files without effect: {why}."
    if only := only_value(path):
        return f"{path}\n  A key of older files: it can only hold {only}."
    if key is None:
        key = entry_of_mapping(path)
    if key is None:
        raise ConfigError([Fault(path, "", "a key that exists", "--explain", suggest_key(path))])
    lines = [path, f"  {key.description}"]
    if key.is_section:
        lines += _explain_group(path, keys)
    else:
        lines.append(f"  holds    {', '.join(target_names(path)) or key.expected}")
        lines.append(f"  default  {'none: it must be given' if key.required else _show(_plain(key.default))}")
    if config is not None and path in config.sources:
        lines.append(f"  value    {_show(leaves(config.shown_tree())[path])}")
        lines.append(f"  from     {config.sources[path]}")
    return "\n".join(lines)


def _explain_group(path: str, keys: Mapping[str, Key]) -> list[str]:
    prefix = f"{pattern_of(path)}."
    inner = [key for key in keys.values() if key.path.startswith(prefix)]
    direct = [key for key in inner if "." not in key.path[len(prefix) :].removeprefix("*.")]
    width = max((len(key.path) - len(prefix) for key in direct), default=0)
    return [f"    {key.path[len(prefix) :].ljust(width)}  {key.description}" for key in direct]


def _is_untouched(source: str) -> bool:
    return source == DEFAULT or source.startswith(_MODEL_FILES)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    return json.dumps(shorten_assets(value), ensure_ascii=False)
