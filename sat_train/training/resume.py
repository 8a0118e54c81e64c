"""Resuming a run: choice of the checkpoint, and check of the settings changed since."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat_train.checkpoint.find import ResumePoint, find_resume_point
from sat_train.checkpoint.load import read_client_state
from sat_train.config import RunConfig
from sat_train.config.catalog import all_keys
from sat_train.config.extensions import KEY
from sat_train.config.loading import leaves
from sat_train.errors import CheckpointError, ConfigError, Fault
from sat_train.log import get_logger
from sat_train.training.run_lock import is_alive

log = get_logger(__name__)

# Keys of a checkpoint's client state.
CONFIG_KEY = "config"
COUNTERS_KEY = "counters"  # of the engine
CALLBACKS_KEY = "callbacks"
RATE_KEY = "next_learning_rate"
PART_FILES_KEY = "part_files"

# Settings that define the model and its data. A change makes another run, which `args.load` starts.
_FIXED = (
    "model",
    "data.target",
    "data.params",
    "data.fields",
    "args.seed",
    "args.train_data",
    "args.train_data_weights",
    "args.split",
    "args.fp16",
    "args.bf16",
    "args.quantize_base",
    "args.ema_decay",
    "deepspeed.optimizer.type",
)
# Settings of the start of a run have no effect on its numbers.
_NOT_A_CHANGE = ("args.resume",)
_FREE_WITHIN_FIXED = (
    "model.sampler_config",
    "model.first_stage_config.params.tile_samples",
    "model.network_config.params.transformer_args.model_parallel_size",
)


def find_resumed(config: RunConfig) -> ResumePoint | None:
    """Returns the checkpoint that `args.resume` selects, or None for a new run.

    Raises:
        CheckpointError: There is none and `args.resume` requires one.
        ConfigError: Names all settings that have changed and may not.

    Ranks: one.
    """
    assert config.args.save is not None, "a run that saves nothing cannot be resumed"
    point = find_resume_point(
        config.args.resume,
        save_root=Path(config.args.save),
        experiment_name=config.args.experiment_name,
        is_alive=is_alive,
    )
    if point is not None:
        check_config_unchanged(_saved_config(point), config)
    return point


def changes_since(point: ResumePoint, config: RunConfig) -> list[str]:
    """Returns the settings that differ from those of a checkpoint, each with its old value."""
    return [
        f"{path} = {json.dumps(new)} (was {json.dumps(old)})"
        for path, old, new in _changes(_saved_config(point), config.shown_tree())
    ]


def _saved_config(point: ResumePoint) -> dict[str, Any]:
    """Returns the resolved configuration of a checkpoint."""
    config = read_client_state(point).get(CONFIG_KEY)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"step {point.step} of {point.run_directory} does not hold its configuration",
            expected="a checkpoint of `sat-train train`",
            remedy="use another step",
        )
    return config


def check_config_unchanged(saved: dict[str, Any], config: RunConfig) -> None:
    """Compares the configuration of a checkpoint with the one that resumes it.

    Raises:
        ConfigError: Names every setting that differs and may not.
    """
    changes = list(_changes(saved, config.shown_tree()))
    faults = [*config.extensions.faults(saved.get(KEY, {}), "the checkpoint")]
    faults += [
        Fault(path, str(new), f"{old}, as in the checkpoint (args.load starts another run from its weights)")
        for path, old, new in changes
        if _is_fixed(path)
    ]
    if faults:
        raise ConfigError(faults)
    for path, old, new in changes:
        log.info("changed since the checkpoint: %s = %s (was %s)", path, new, old)


def check_part_files(point: ResumePoint, part_files: Mapping[str, str]) -> None:
    """Compares the files of weights that parts name with those of a checkpoint, by their contents.

    Args:
        point: The checkpoint; one that does not hold their hashes is not compared.
        part_files: Hashes by path, from `digest_part_files`.

    Raises:
        CheckpointError: The content of a file has changed.
    """
    saved = read_client_state(point).get(PART_FILES_KEY)
    saved = saved if isinstance(saved, dict) else {}
    changed = [path for path, content in part_files.items() if saved.get(path, content) != content]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)}: not the weights that step {point.step} of {point.run_directory} was "
            "trained with",
            expected="files with the contents that they had",
            remedy="restore them, or start another run from its weights with args.load",
        )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before, after = leaves(old), leaves(new)
    for path in sorted(before.keys() | after.keys()):
        # a key that the checkpoint's version did not have: its default is what that version did
        is_new = path not in before and path in all_keys() and all_keys()[path].default == after[path]
        if before.get(path) != after.get(path) and path not in _NOT_A_CHANGE and not is_new:
            yield path, before.get(path), after.get(path)


def _is_fixed(path: str) -> bool:
    return _is_under(path, _FIXED) and not _is_under(path, _FREE_WITHIN_FIXED)


def _is_under(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith((prefix + ".", prefix + "[")) for prefix in prefixes)
