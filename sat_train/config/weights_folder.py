"""Paths of text encoder, tokenizer and autoencoder, found next to the transformer's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sat_train.config.aliases import get_value
from sat_train.config.layers import Merged, merge_layers, read_layer, replace_value
from sat_train.config.paths import exists, is_placeholder
from sat_train.config.run_model import find_resolved

TEXT_ENCODER = "model.conditioner_config.params.emb_models.0.params.model_dir"
AUTOENCODER = "model.first_stage_config.params.ckpt_path"
_FOUND = "found next to args.load"


def fill_frozen_models(merged: Merged) -> None:
    """Fills in the paths of text encoder and autoencoder that a preset has left to the user.

    With `args.load` a diffusers folder (or its `transformer/`) they lie in that folder; with a run directory
    they are the ones that run was trained with. A path that the user has set is never changed.

    Args:
        merged: Changed in place, before it is validated.
    """
    load = get_value(merged.tree, "args.load")
    if not isinstance(load, str) or is_placeholder(load):
        return
    paths = _beside(Path(os.path.expanduser(load))) or _of_run(load)
    for key, path in paths.items():
        standing = get_value(merged.tree, key)
        if isinstance(path, str) and isinstance(standing, str) and is_placeholder(standing):
            replace_value(merged.tree, key.split("."), path)
            merged.sources[key] = _FOUND


def _beside(load: Path) -> dict[str, Any]:
    """Returns the parts of a diffusers folder; nothing where `args.load` is not one."""
    folders = [folder for folder in (load, load.parent) if exists(folder / "transformer")]
    if not folders or (folders[0] != load and load.name != "transformer"):
        return {}
    return {TEXT_ENCODER: str(folders[0]), AUTOENCODER: str(folders[0] / "vae")}


def _of_run(load: str) -> dict[str, Any]:
    """Returns the parts that a run was trained with; nothing where `args.load` is not a run directory."""
    path = find_resolved(load)
    if path is None:
        return {}
    tree = merge_layers([read_layer(path, [])]).tree
    return {key: get_value(tree, key) for key in (TEXT_ENCODER, AUTOENCODER)}
