"""The one way to a RunConfig: read, merge, fold, validate, check; or name every fault at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from sat_train.config.aliases import fold_aliases, get_value
from sat_train.config.batch_keys import translate_batch_keys
from sat_train.config.extensions import KEY, Extensions, load_extensions
from sat_train.config.fixed_keys import drop_fixed_keys
from sat_train.config.layers import (
    DEFAULT,
    EMBEDDED,
    Layer,
    Merged,
    merge_layers,
    read_layers,
)
from sat_train.config.legacy import NO_EFFECT
from sat_train.config.parts.record import Record
from sat_train.config.path_rules import placeholders
from sat_train.config.paths import PACKAGE, expand_assets
from sat_train.config.references import resolve_references
from sat_train.config.rule import ParsedConfig, Purpose
from sat_train.config.rules import all_rules, check_rules, warnings_of
from sat_train.config.run import RunConfig, Sections
from sat_train.config.run_model import check_recorded_extensions, find_run, use_model_of_run
from sat_train.config.sat_forks import answer_fork_keys
from sat_train.config.section_check import validate
from sat_train.config.trained_names import translate_trained_names
from sat_train.config.weights_folder import fill_frozen_models
from sat_train.config.words import COMMAND_LINE
from sat_train.errors import ConfigError, Fault

# Settings of the embedded model that belong to its demo clips, `args.train_data`.
_WITH_DEMO_DATA = ("valid_data", "valid_prompts", "valid_images")


def load_run_config(
    base: Sequence[str | Path] = (),
    words: Sequence[str] = (),
    *,
    purpose: Purpose = "train",
    check_paths: bool = True,
) -> RunConfig:
    """Reads the configuration of a run.

    Args:
        base: YAML files, merged in order.
        words: The rest of the command line: `key.path=value` words and SAT flags, which win over all
            files, and `--extension NAME`.
        purpose: Training or sampling; sampling, for example, needs no training data.
        check_paths: Also check that data and weights exist.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: Names every fault. An extension that cannot be imported, or is missing, is named alone:
            the other faults might follow from it.
    """
    faults: list[Fault] = []
    extensions, words = load_extensions(words)
    layers = read_layers(base, words, faults)
    if purpose == "sample":
        layers = use_model_of_run(layers, faults)
    merged = merge_layers(layers)
    check_recorded_extensions(extensions, layers, find_run(merged, purpose))
    _settle(merged, faults)
    is_whole = not any(layer.is_unread for layer in layers)
    sections = validate(merged, _embedded_tree, faults, is_whole=is_whole)
    if sections is None or not is_whole:  # the content of a file that cannot be read is unknown
        raise ConfigError(faults)
    parsed_config = ParsedConfig(
        **dict(sections),
        purpose=purpose,
        source_of=partial(_source_of_given, merged),
    )
    check_rules(parsed_config, all_rules(), faults)
    if check_paths:
        check_rules(parsed_config, all_rules(looking_at_paths=True), faults)
    if faults:
        raise ConfigError(faults)
    return RunConfig(
        **dict(sections),
        sources=_sources(sections, merged, extensions),
        extensions=extensions,
        notes=(*_notes(layers, merged, parsed_config), *warnings_of(parsed_config)),
        needs=_missing_for_use(parsed_config) if purpose == "check" else "",
    )


def _settle(merged: Merged, faults: list[Fault]) -> None:
    """Resolves other spellings and references in the tree, and fills in the paths found next to weights."""
    translate_trained_names(merged, faults)
    translate_batch_keys(merged, faults)
    answer_fork_keys(merged, faults)
    drop_fixed_keys(merged, faults)
    fold_aliases(merged, faults)
    resolve_references(merged, faults)
    _drop_demo(merged)
    merged.tree = expand_assets(merged.tree)
    fill_frozen_models(merged)


def _drop_demo(merged: Merged) -> None:
    """Drops the demo's validation clips and prompts once the user has named other training data."""
    args = merged.tree.get("args")
    if not isinstance(args, dict) or merged.source_of("args.train_data") == EMBEDDED:
        return
    for key in _WITH_DEMO_DATA:
        if merged.sources.get(f"args.{key}") == EMBEDDED:
            del args[key], merged.sources[f"args.{key}"]


def _embedded_tree() -> dict[str, Any]:
    merged = merge_layers(read_layers([PACKAGE / EMBEDDED], [], []))
    tree: dict[str, Any] = expand_assets(merged.tree)
    return tree


def _source(merged: Merged, path: str) -> str:
    return merged.source_of(path) or DEFAULT


def _source_of_given(merged: Merged, path: str) -> str:
    """Returns the file that holds a key: a default is in none, even if a file holds the rest of its group."""
    parent = path
    while get_value(merged.tree, parent) is PydanticUndefined and "." in parent:
        parent = parent.rpartition(".")[0]  # one text may stand for a list: its index has no key
    holds = get_value(merged.tree, parent)
    is_default = holds is PydanticUndefined or (parent != path and isinstance(holds, dict))
    return DEFAULT if is_default else _source(merged, path)


def _sources(sections: Sections, merged: Merged, extensions: Extensions) -> dict[str, str]:
    of_sections = {path: _source_of_given(merged, path) for path in leaves(sections)}
    return of_sections | dict.fromkeys(leaves({KEY: extensions.tree()}), COMMAND_LINE)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Returns the values of a record, or of a tree of plain dictionaries, by dotted path.

    Args:
        value: Record, dictionary, list of records, or a plain value.
        path: Path of the value itself.
    """
    if isinstance(value, Record):
        items: Any = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (Record, dict)):
        items = enumerate(value)
    else:
        return {path: value}
    values: dict[str, Any] = {}
    for key, item in items:
        values.update(leaves(item, f"{path}.{key}" if path else str(key)))
    return values


def _notes(layers: Sequence[Layer], merged: Merged, config: ParsedConfig) -> list[str]:
    notes = []
    if any(layer.is_embedded for layer in layers):
        notes.append(f"No file chooses a network: the embedded tiny model is used ({EMBEDDED}).")
    dropped = {path: why for layer in layers for path, why in layer.dropped.items()}
    if dropped:
        keys = ", ".join(path if why == NO_EFFECT else f"{path} ({why})" for path, why in dropped.items())
        notes.append(f"Keys of older files that have no effect: {keys}.")
    if merged.translated:
        keys = ", ".join(f"{path} ({ours})" for path, ours in merged.translated.items())
        notes.append(f"Keys of SAT forks, as they are here: {keys}.")
    sampling_fps = config.args.sampling_fps
    data_fps = None if config.data is None else config.data.params.fps
    if sampling_fps is not None and data_fps is not None and sampling_fps != data_fps:
        notes.append(
            f"Videos are written at args.sampling_fps = {sampling_fps:g}, but data.params.fps = {data_fps:g}."
        )
    if config.purpose == "sample" and (latent := config.args.sampling_num_frames) is not None:
        frames = config.spec.pixel_frames(latent)
        notes.append(f"args.sampling_num_frames = {latent} latent frames: {frames} frames of video.")
    return notes


def _missing_for_use(config: ParsedConfig) -> str:
    """Returns what a partial configuration still needs before it trains, or samples: one key a line."""
    verb: Purpose = "sample" if config.args.mode == "inference" else "train"
    faults: list[Fault] = []
    check_rules(replace(config, purpose=verb), all_rules(), faults)
    needs = [f"{fault.path}: {fault.expected}" for fault in faults]
    needs += [f"{path}, to be filled in" for path in placeholders(config)]
    return "\n  - ".join([f"to {verb} it needs", *needs]) if needs else ""
