"""Model and extensions of an earlier run, for sampling from it or resuming it."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sat_train.config.extensions import Extensions
from sat_train.config.layers import Layer, Merged, merge_layers, read_layer
from sat_train.config.paths import exists
from sat_train.config.reading import RESOLVED
from sat_train.config.rule import Purpose
from sat_train.config.schema.args import ArgsConfig
from sat_train.errors import ConfigError, Fault

# Settings of the model and its samples, not of its training.
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
_DATA = ("params", "fields")


def use_model_of_run(layers: list[Layer], faults: list[Fault]) -> list[Layer]:
    """Replaces the embedded model by that of the run that `args.load` names.

    Args:
        layers: From `read_layers`. Nothing changes when one of their files chooses a network.
        faults: Receives a `resolved.yaml` that cannot be read.

    Returns:
        The layers, with the embedded ones replaced by one of the run.
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
    rest = [layer for layer in layers if not layer.is_embedded]
    return [Layer(resolved.name, {name: section for name, section in tree.items() if section}, {}), *rest]


def check_recorded_extensions(extensions: Extensions, layers: Sequence[Layer], resolved: Path | None) -> None:
    """Compares the extensions with those that the files and the resumed run were written with.

    Args:
        extensions: The loaded extensions.
        layers: The files.
        resolved: `resolved.yaml` of the run; None where there is none.

    Raises:
        ConfigError: Some are missing, or have changed and `--accept-changed-extension` is not given.
    """
    of_run = [read_layer(resolved, [])] if resolved is not None else []
    faults = {
        fault.path: fault
        for layer in [*layers, *of_run]
        if layer.extensions is not None
        for fault in extensions.faults(layer.extensions, layer.name)
    }
    if faults:
        raise ConfigError(list(faults.values()))


def find_run(merged: Merged, purpose: Purpose) -> Path | None:
    """Returns the `resolved.yaml` of the run that is sampled or resumed; None where there is none."""
    args = merged.tree.get("args")
    args = args if isinstance(args, dict) else {}
    load, resume, save = args.get("load"), args.get("resume"), args.get("save", ArgsConfig().save)
    if purpose == "sample":
        return find_resolved(load) if isinstance(load, str) else None
    if resume not in ("auto", "must"):
        return find_resolved(resume) if isinstance(resume, str) and resume != "none" else None
    if not isinstance(save, str):
        return None
    name = str(args.get("experiment_name", ArgsConfig().experiment_name))
    digits = "[0-9]"  # of the date and time behind the name
    folders = f"{glob.escape(name)}-{digits * 8}-{digits * 6}"
    runs = sorted(Path(os.path.expanduser(save)).glob(f"{folders}/{RESOLVED}"))
    return runs[-1] if runs else None


def find_resolved(load: str) -> Path | None:
    """Returns the `resolved.yaml` of the run that a path to weights lies in, None for other weights.

    Args:
        load: A run directory, or one of its steps.
    """
    folder = Path(os.path.expanduser(load))
    candidates = (folder / RESOLVED, folder.parent / RESOLVED)
    return next((path for path in candidates if exists(folder) and exists(path)), None)
