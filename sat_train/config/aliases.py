"""Settings that CogVideo's files can spell in two places, brought to one value.

`deepspeed:` is not a second source of truth: a later file wins over an earlier one whichever spelling each of
them uses, the command line wins over all files, and afterwards both spellings hold the same value. Only a
file that contradicts itself is an error.
"""

from __future__ import annotations

import copy
from typing import Any

from pydantic_core import PydanticUndefined

from sat_train.config.catalog import is_place, slot_targets
from sat_train.config.layers import DEFAULT, Merged, forget_sources
from sat_train.config.parts.guidance_parts import GuidanceConfig
from sat_train.config.parts.registry import Choice
from sat_train.config.parts.sampler_parts import SamplerConfig
from sat_train.config.schema.args import ArgsConfig
from sat_train.errors import Fault

_ZERO = "deepspeed.zero_optimization"
_SAT_ARGS = "model.network_config.params.transformer_args"
_SAMPLER = "model.sampler_config"
_GUIDER = f"{_SAMPLER}.params.guider_config"

SAME = {
    "args.lr": "deepspeed.optimizer.params.lr",
    "args.weight_decay": "deepspeed.optimizer.params.weight_decay",
    "args.batch_size": "deepspeed.train_micro_batch_size_per_gpu",
    "args.gradient_accumulation_steps": "deepspeed.gradient_accumulation_steps",
    "args.clip_grad": "deepspeed.gradient_clipping",
    "args.zero_stage": f"{_ZERO}.stage",
    "args.fp16": "deepspeed.fp16.enabled",
    "args.bf16": "deepspeed.bf16.enabled",
    "args.checkpoint_activations": f"{_SAT_ARGS}.checkpoint_activations",
    "args.model_parallel_size": f"{_SAT_ARGS}.model_parallel_size",
}
# Here the first spelling, if present, wins over the second unless a later layer sets the second.
WINS_OVER = (
    ("args.sampler", f"{_SAMPLER}.target"),
    ("args.sampling_steps", f"{_SAMPLER}.params.num_steps"),
    ("args.guidance_scale", f"{_GUIDER}.params.scale"),
)
_SLOTS: dict[str, type[Choice]] = {_SAMPLER: SamplerConfig, _GUIDER: GuidanceConfig}


def fold_aliases(merged: Merged, faults: list[Fault]) -> None:
    """Sets all spellings of one setting to the same value.

    Args:
        merged: Changed in place.
        faults: Receives contradictions between files, naming both.
    """
    for first, second in SAME.items():
        _fold_same(merged, first, second, faults)
    for path, choice in _SLOTS.items():
        if get_value(merged.tree, f"{path}.target") is PydanticUndefined:
            _set(merged, f"{path}.target", choice.model_fields["target"].default, DEFAULT)
    for first, second in WINS_OVER:
        _fold_winner(merged, first, second)
    _fold_guidance_steps(merged)


def get_value(tree: Any, path: str) -> Any:
    """Returns the value at a dotted path, or `PydanticUndefined` when the tree has no such key."""
    for part in path.split("."):
        if isinstance(tree, list) and is_place(part) and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            return PydanticUndefined
    return tree


def remove_value(merged: Merged, path: str) -> None:
    """Removes a key that the tree has, with its sources."""
    parent, _, leaf = path.rpartition(".")
    group: Any = get_value(merged.tree, parent) if parent else merged.tree
    del group[int(leaf) if isinstance(group, list) else leaf]
    forget_sources(merged.sources, path)


def _fold_same(merged: Merged, first: str, second: str, faults: list[Fault]) -> None:
    spelled = {path: get_value(merged.tree, path) for path in (first, second)}
    each_other = {f"${{{first}}}", f"${{{second}}}"}  # a reference to the other spelling does not count
    values = {
        path: value
        for path, value in spelled.items()
        if value is not PydanticUndefined and not (isinstance(value, str) and value in each_other)
    }
    if not values:
        _set(merged, second, copy.copy(ArgsConfig.model_fields[first.removeprefix("args.")].default), DEFAULT)
        return
    latest = max(map(merged.rank_of, values))
    winners = {path: value for path, value in values.items() if merged.rank_of(path) == latest}
    if not _are_equal(list(winners.values())):
        other = f"{second} = {winners[second]} [{merged.source_of(second)}]"
        faults.append(Fault(first, str(winners[first]), f"the same as {other}", merged.source_of(first)))
    winner = next(iter(winners))
    source = merged.source_of(winner)
    for path in (first, second):
        if path != winner:
            _set(merged, path, winners[winner], source)


def _are_equal(values: list[Any]) -> bool:
    """Returns whether two values are equal as settings: 1 and 1.0 are, 1 and true are not."""
    first = values[0]
    return all(value == first and isinstance(value, bool) == isinstance(first, bool) for value in values)


def _fold_winner(merged: Merged, first: str, second: str) -> None:
    value = get_value(merged.tree, first)
    if value is None or value is PydanticUndefined:
        return
    if get_value(merged.tree, second) is not PydanticUndefined and merged.rank_of(second) > merged.rank_of(
        first
    ):
        _set(merged, first, get_value(merged.tree, second), merged.source_of(second))
    else:
        if second.endswith(".target"):
            _drop_earlier_params(merged, second.removesuffix(".target"), str(value), merged.rank_of(first))
        _set(merged, second, value, merged.source_of(first))


def _drop_earlier_params(merged: Merged, place: str, target: str, rank: int) -> None:
    """Drops params of earlier layers that another target does not have, as merging does."""
    params, record = get_value(merged.tree, f"{place}.params"), slot_targets()[place].params.get(target)
    if not isinstance(params, dict) or record is None:
        return
    for key in params.keys() - record.model_fields.keys():
        path = f"{place}.params.{key}"
        if merged.rank_of(path) < rank:
            del params[key]
            forget_sources(merged.sources, path)


def _fold_guidance_steps(merged: Merged) -> None:
    """Lets guidance grow over the sampler's steps where a later layer changes only those."""
    steps, guided = f"{_SAMPLER}.params.num_steps", f"{_GUIDER}.params.num_steps"
    if isinstance(get_value(merged.tree, guided), int) and merged.rank_of(steps) > merged.rank_of(guided):
        _set(merged, guided, get_value(merged.tree, steps), merged.source_of(steps))


def _set(merged: Merged, path: str, value: Any, source: str) -> None:
    """Writes a value where its section is a group; `validate` reports any other kind of section."""
    *groups, leaf = path.split(".")
    node: Any = merged.tree
    for group in groups:
        node = node.setdefault(group, {}) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[leaf] = value
        merged.derived.add(path)
        merged.sources[path] = source
