"""Reads and merges LoRA adapters of all trainers. SAT scales by alpha / rank and stores alpha next to it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from sat_train.checkpoint.manifest import verify_checkpoint
from sat_train.config.parts.adapter_parts import (
    ALPHA_KEY,
    LAYER_ALPHA,
    RANK_KEY,
    find_adapter,
    find_adapter_tensor,
)
from sat_train.errors import CheckpointError
from sat_train.interchange.adapter_export import at_trained_scale
from sat_train.interchange.locate import Located, read_own_weights
from sat_train.interchange.sources import find_weights
from sat_train.models.low_rank import (
    LowRank,
    Parts,
    Updates,
    misfits,
    stacked,
    strengthened,
    updated_weight,
)
from sat_train.weights.diffusers_keys import Part, part_of_diffusers_key, parts_of_sat_key
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, shard_tensor
from sat_train.weights.lora_files import holds_lora, read_lora_modules
from sat_train.weights.readers import read_metadata, read_weight_files

_DEFAULT_ALPHA = 1.0  # SAT's, whose checkpoints do not hold it


def is_adapter_key(key: str) -> bool:
    """Returns whether a SAT key belongs to an adapter."""
    return find_adapter_tensor(key) is not None or key in (RANK_KEY, ALPHA_KEY)


def holds_adapters(located: Located) -> bool:
    """Returns whether located weights have adapters of their own."""
    return any(is_adapter_key(key) for key in read_own_weights(find_weights(located.path)))


def without_adapters(weights: LazyWeights) -> LazyWeights:
    """Returns the weights without the adapters."""
    return weights.select(lambda key: None if is_adapter_key(key) else key)


def read_lora(path: str | Path, *, ema: bool = False) -> Updates:
    """Reads adapters: of a run or step of ours, of SAT, or a file or folder of diffusers, PEFT or kohya.

    Args:
        path: Path of the adapters. Base weights in the same place are not read.
        ema: Read their average, from a run of ours that keeps one.

    Returns:
        The updates by layer; none if the weights have no adapters.

    Raises:
        CheckpointError: Nothing is there, it is damaged, or a key, layer or kind of adapter is unknown.
    """
    source = find_weights(path)
    if source.kind == "step":
        verify_checkpoint(source.path)
    if source.kind == "files" and not ema:
        weights = read_weight_files(source.files)
        if holds_lora(weights):
            modules = read_lora_modules(weights, source.files[0])
            updates = updates_of_modules(modules, where=weights.where)
            return at_trained_scale(updates, read_metadata(source.files[0]), weights.where)
        if any(find_adapter_tensor(key) for key in weights):
            bare = weights.select(lambda key: re.sub(r"^(module\.)?model\.diffusion_model\.", "", key))
            return updates_of(bare)
    return updates_of(read_own_weights(source, ema=ema))


def read_given_lora(path: str | Path) -> Updates:
    """Reads adapters as `read_lora` does, but requires that there are some.

    Raises:
        CheckpointError: There are none.
    """
    updates = read_lora(path)
    if not updates:
        raise CheckpointError(f"{path} holds no LoRA adapters", expected="a LoRA run, or a file of adapters")
    return updates


def read_given_loras(paths: Sequence[str | Path], strengths: Sequence[float]) -> Updates:
    """Returns the exact sum of several adapters; none for no paths.

    Args:
        paths: As for `read_given_lora`.
        strengths: Factor on each, or one for all.

    Raises:
        CheckpointError: One has no adapters, or is DoRA's and not alone at strength 1.
    """
    total: Updates = {}
    for path, strength in zip(
        paths, list(strengths) * (len(paths) if len(strengths) == 1 else 1), strict=True
    ):
        total = stacked(total, strengthened(read_given_lora(path), strength))
    return total


def updates_of(weights: LazyWeights) -> Updates:
    """Reads the adapters among SAT's weights.

    Raises:
        CheckpointError: Half a pair, matrices that do not multiply, an alpha that is not a number, or a kind
            of adapter that works in its own run only.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key in weights:
        if found := find_adapter_tensor(key):
            layers.setdefault(found[0], {})[key[len(found[0]) + 1 :]] = weights[key]
    alpha = _number(ALPHA_KEY, weights[ALPHA_KEY], weights.where) if ALPHA_KEY in weights else _DEFAULT_ALPHA
    return {layer: _read_layer(layer, tensors, alpha, weights.where) for layer, tensors in layers.items()}


def _number(key: str, stored: Tensor, where: str) -> float:
    if stored.numel() != 1 or not math.isfinite(float(stored)):
        raise CheckpointError(f"{where}: {key} is not a number", expected="one finite number")
    return float(stored)


def _read_layer(layer: str, tensors: dict[str, Tensor], alpha: float, where: str) -> Parts:
    """Returns the updates of a layer by the kind of adapter that saves such tensors."""
    if LAYER_ALPHA in tensors:
        alpha = _number(f"{layer}.{LAYER_ALPHA}", tensors.pop(LAYER_ALPHA), where)
    record = find_adapter({name.partition(".")[0] for name in tensors})
    if record is None or not record.read:
        raise CheckpointError(
            f"{where}: the adapter of {layer} has {', '.join(sorted(tensors))}",
            expected="a kind of adapter that says how it is read",
            remedy="it works in the run that trained it",
        )
    rank = _check_complete(layer, tensors, list(record.tensors), where)
    module, _, function = record.read.partition(":")
    parts: Parts = getattr(import_module(module), function)(tensors, alpha / rank)
    return parts


def _check_complete(layer: str, tensors: Mapping[str, Tensor], names: Sequence[str], where: str) -> int:
    """Returns the rank, once all tensors of a layer's adapter are there and fit each other."""
    counts = {name: sum(key.partition(".")[0] == name for key in tensors) for name in names}
    count = max(counts.values())
    if tensors.keys() != {f"{name}.{index}" for name in names for index in range(count)}:
        found = " and ".join(f"{number} {name}" for name, number in counts.items())
        raise CheckpointError(f"{where}: the adapter of {layer} has {found}, or not all parts")
    ranks = set()
    for index in range(count):
        shapes = {name: tuple(tensors[f"{name}.{index}"].shape) for name in names}
        for name in (name for name in names if name.endswith("_A")):
            down, up = shapes[name], shapes[f"{name[:-1]}B"]
            if len(down) != 2 or len(up) != 2 or not 0 < down[0] == up[1]:
                both = f"{list(down)} and {list(up)}"
                raise CheckpointError(f"{where}: the matrices {index} of {layer} do not multiply: {both}")
            ranks.add(down[0])
            vectors = [name for name in names if not name.endswith(("_A", "_B"))]
            if any(shapes[name] != up[:1] for name in vectors):
                raise CheckpointError(f"{where}: the vectors {index} of {layer} do not have {up[0]} elements")
    if len(ranks) > 1:
        raise CheckpointError(f"{where}: the adapter of {layer} has several ranks: {sorted(ranks)}")
    return int(ranks.pop())


def updates_of_modules(modules: Mapping[str, LowRank], *, where: str) -> Updates:
    """Returns updates under SAT's layers, given those of diffusers' (or SAT's) modules.

    SAT's adapters of q, k, v are three, one each. Of its other fused layers there is one adapter over the
    whole output: there the ranks of the modules add up, unless they share their A, as our own export does.

    Raises:
        CheckpointError: A module that no CogVideoX transformer has.
    """
    updates: dict[str, list[LowRank | None]] = {}
    fused: dict[str, list[tuple[Part, LowRank]]] = {}
    for module, update in modules.items():
        part = part_of_diffusers_key(f"{module}.weight")
        own = parts_of_sat_key(f"{module}.weight")
        if part is not None and len(parts_of_sat_key(part.sat_key)) == part.pieces:
            layer = part.sat_key.removesuffix(".weight")
            updates.setdefault(layer, [None] * part.pieces)[part.chunks[0]] = update
        elif part is not None:
            fused.setdefault(part.sat_key.removesuffix(".weight"), []).append((part, update))
        elif own:
            count = len(own) if len(own) == own[0].pieces else 1
            updates[module] = [replace(update, up=rows) for rows in update.up.chunk(count)]
        else:
            raise CheckpointError(
                f"{where}: {module} is not a layer of a CogVideoX transformer", expected="a CogVideoX LoRA"
            )
    for layer, members in fused.items():
        updates[layer] = [_over_all_rows(members)]
    return {layer: tuple(parts) for layer, parts in updates.items()}


def _over_all_rows(members: list[tuple[Part, LowRank]]) -> LowRank:
    first_part, first = members[0]
    rows = first.up.shape[0] // len(first_part.chunks)
    is_shared = all(
        torch.equal(other.down, first.down) and other.scale == first.scale for _, other in members
    )
    downs, ups = [], []
    for part, update in members:
        chunks: list[Tensor] = [torch.zeros(rows, update.rank)] * part.pieces
        for index, chunk in zip(part.chunks, update.up.float().chunk(len(part.chunks)), strict=True):
            chunks[index] = chunk
        downs.append(update.down.float())
        ups.append(torch.cat(chunks) * (1.0 if is_shared else update.scale))
    if is_shared:
        return LowRank(downs[0], torch.stack(ups).sum(0), first.scale)
    return LowRank(torch.cat(downs), torch.cat(ups, dim=1), 1.0)


def merge_updates(weights: LazyWeights, updates: Updates, *, dtype: torch.dtype | None = None) -> LazyWeights:
    """Adds updates to weights lazily: each sum is computed in fp32 and cast once, on access.

    Args:
        weights: The base weights, whole.
        updates: The updates to add.
        dtype: Dtype of the merged weights; None keeps that of each weight.

    Raises:
        CheckpointError: An update of a layer that the weights do not have, or of another shape.
    """
    shapes = {
        key.removesuffix(".weight"): shape for key, shape in weights.shapes.items() if key.endswith(".weight")
    }
    if faults := misfits(updates, shapes):
        raise CheckpointError(
            "\n  - ".join(
                [f"the adapter does not fit {weights.where} ({len(faults)} faults):", *sorted(faults)]
            ),
            expected="an adapter of these weights",
        )
    lazy_tensors = dict(weights.tensors)
    for layer, parts in updates.items():
        lazy = weights.tensors[f"{layer}.weight"]
        target = dtype or lazy.dtype
        lazy_tensors[f"{layer}.weight"] = LazyTensor(
            lazy.shape, target, partial(_read_merged, lazy, parts, target)
        )
    return LazyWeights(lazy_tensors, where=weights.where)


def _read_merged(weight: LazyTensor, parts: Parts, dtype: torch.dtype, shard: Shard | None) -> Tensor:
    merged = updated_weight(weight.read(None).float(), parts)
    return shard_tensor(merged.to(dtype), shard)


def check_merged(written: LazyWeights, base: LazyWeights, updates: Updates) -> None:
    """Compares merged weights with a sum in fp64: each value must be its rounding to the written dtype.

    Raises:
        CheckpointError: A value differs by more.
    """
    for layer, parts in updates.items():
        key = f"{layer}.weight"
        merged, weight = written[key], base[key].double()
        expected = updated_weight(weight, parts)
        info = torch.finfo(merged.dtype)
        # half a step of the dtype, and what sums in fp32 lose before the cast
        size = _sum_of_sizes(weight, parts)
        allowed = expected.abs() * (info.eps * 0.501) + size * 2.0**-19 + info.smallest_normal * info.eps
        wrong = ~((merged.double() - expected).abs() <= allowed)
        if wrong.any():
            raise CheckpointError(
                f"{written.where}: {int(wrong.sum())} values of {key} are not weight + scale * B @ A",
                expected="the sum of weight and update, rounded once",
                remedy="a value beyond the range of the dtype needs --dtype bf16 or fp32; else report it",
            )


def _sum_of_sizes(weight: Tensor, parts: Parts) -> Tensor:
    """Returns the sum of the absolute values of all terms of the updated weight, in fp64."""
    sizes = tuple(part and LowRank(part.down.abs(), part.up.abs(), abs(part.scale)) for part in parts)
    total = updated_weight(weight.abs(), sizes)
    if not any(part is not None and part.magnitude is not None for part in parts):
        return total
    without = tuple(part and replace(part, magnitude=None) for part in parts)
    lengths = [torch.linalg.vector_norm(updated_weight(weight, each), dim=1) for each in (parts, without)]
    factor: Tensor = lengths[0] / lengths[1]
    return total * factor[:, None]
