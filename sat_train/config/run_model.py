"""Sampling from a run directory: the model is the one that the run trained, adapters included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sat_train.config.layers import Layer, merge_layers, read_layer
from sat_train.config.paths import exists
from sat_train.config.reading import RESOLVED
from sat_train.errors import Fault

# What belongs to the model and its samples, not to the training of it.
_ARGS = (
    "fp16",
    "bf16",
    "sampling_fps",
    "sampling_image_size",
    "sampling_num_frames",
    "sampling_steps",
    "sampler",
    "guidance_scale",
)
_DATA = ("params",)


def use_model_of_run(layers: list[Layer], faults: list[Fault]) -> list[Layer]:
    """Puts the model of the run that `args.load` names in place of the embedded one.

    Args:
        layers: From `read_layers`. Nothing changes when one of their files chooses a network.
        faults: Gets a `resolved.yaml` that cannot be read.

    Returns:
        The layers, or those of nobody's choice replaced by one of the run.
    """
    if not any(layer.is_embedded for layer in layers):
        return layers
    args = merge_layers(layers).tree.get("args")
    load = args.get("load") if isinstance(args, dict) else None
    path = find_resolved(load) if isinstance(load, str) else None
    if path is None:
        return layers
    resolved = read_layer(path, faults)
    tree: dict[str, Any] = {"model": resolved.tree.get("model", {})}
    for section, keys in (("args", _ARGS), ("data", _DATA)):
        values = resolved.tree.get(section) or {}
        tree[section] = {key: values[key] for key in keys if key in values}
    chosen = [layer for layer in layers if not layer.is_embedded]
    return [Layer(resolved.name, {name: section for name, section in tree.items() if section}, {}), *chosen]


def find_resolved(load: str) -> Path | None:
    """Returns the `resolved.yaml` of the run that a path to weights lies in, None for other weights.

    Args:
        load: A run directory, or one of its steps.
    """
    folder = Path(os.path.expanduser(load))
    candidates = (folder / RESOLVED, folder.parent / RESOLVED)
    return next((path for path in candidates if exists(folder) and exists(path)), None)
