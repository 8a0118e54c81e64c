"""Reads, writes and merges LoRA adapters, in SAT's names and in PEFT's as diffusers loads them.

SAT scales an update by alpha / rank and stores alpha next to it. The way diffusers uses a file's alpha has
changed between versions, and without one it takes alpha = rank. So exported files carry the scale in their B
matrices and say alpha = rank: at scale 1.0 every reader, old or new, gets the update as it was trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sat_train.checkpoint.manifest import verify_checkpoint
from sat_train.config.parts.adapter_parts import ALPHA_KEY, LORA_MATRIX, RANK_KEY, find_adapter_tensor
from sat_train.errors import CheckpointError
from sat_train.interchange.locate import read_own_weights
from sat_train.interchange.sources import find_weights
from sat_train.models.low_rank import LowRank, Updates, common_scale, highest_rank, misfits, whole_delta
from sat_train.weights.diffusers_keys import Part, part_of_diffusers_key, parts_of_sat_key
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, shard_tensor
from sat_train.weights.lora_files import PEFT_METADATA_KEY, holds_lora, read_lora_modules
from sat_train.weights.readers import read_metadata, read_weight_files

TRAINED_ALPHA_KEY = "sat_train.lora_alpha"
_DEFAULT_ALPHA = 1.0  # SAT's, whose checkpoints do not hold it


def is_adapter_key(key: str) -> bool:
    """Returns whether a SAT key belongs to an adapter."""
    return find_adapter_tensor(key) is not None or key in (RANK_KEY, ALPHA_KEY)


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
            return _at_trained_alpha(updates, read_metadata(source.files[0]), weights.where)
        if any(LORA_MATRIX.search(key) for key in weights):
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


def updates_of(weights: LazyWeights) -> Updates:
    """Reads the adapters among SAT's weights.

    Raises:
        CheckpointError: Half a pair, matrices that do not multiply, or an alpha that is not a number.
    """
    layers: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key in weights:
        if match := LORA_MATRIX.fullmatch(key):
            layers.setdefault(match[1], {"A": {}, "B": {}})[match[2]][int(match[3])] = weights[key]
    if not layers:
        return {}
    alpha = _stored_alpha(weights)
    return {layer: _parts(layer, sides, alpha, weights.where) for layer, sides in layers.items()}


def _stored_alpha(weights: LazyWeights) -> float:
    if ALPHA_KEY not in weights:
        return _DEFAULT_ALPHA
    stored = weights[ALPHA_KEY]
    if stored.numel() != 1 or not math.isfinite(float(stored)):
        raise CheckpointError(f"{weights.where}: {ALPHA_KEY} is not a number", expected="one finite number")
    return float(stored)


def _parts(layer: str, sides: dict[str, dict[int, Tensor]], alpha: float, where: str) -> tuple[LowRank, ...]:
    downs, ups = sides["A"], sides["B"]
    if downs.keys() != ups.keys() or sorted(downs) != list(range(len(downs))):
        raise CheckpointError(
            f"{where}: the adapter of {layer} has {len(downs)} A and {len(ups)} B matrices, or not all parts"
        )
    for index, down in downs.items():
        if down.dim() != 2 or ups[index].dim() != 2 or not 0 < down.shape[0] == ups[index].shape[1]:
            shapes = f"{list(down.shape)} and {list(ups[index].shape)}"
            raise CheckpointError(f"{where}: the matrices {index} of {layer} do not multiply: {shapes}")
    return tuple(LowRank(downs[i], ups[i], alpha / downs[i].shape[0]) for i in range(len(downs)))


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


def _at_trained_alpha(updates: Updates, metadata: Mapping[str, str], where: str) -> Updates:
    """Restores the scale that our own export was trained with; the product B @ A stays the same."""
    if TRAINED_ALPHA_KEY not in metadata:
        return updates
    try:
        alpha = float(metadata[TRAINED_ALPHA_KEY])
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise CheckpointError(f"{where}: {TRAINED_ALPHA_KEY} is not a positive number", expected="e.g. 1.0")
    return {
        layer: tuple(
            part and LowRank(part.down, part.scaled_up(alpha / part.rank), alpha / part.rank)
            for part in parts
        )
        for layer, parts in updates.items()
    }


def updates_to_peft(updates: Updates) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Renames updates for diffusers.

    Args:
        updates: Whole updates under SAT's layers.

    Returns:
        fp32 tensors and safetensors metadata of a file for `pipe.load_lora_weights`. Lower ranks are padded
        with zeros to the highest, because readers differ in how they treat several ranks.

    Raises:
        CheckpointError: A layer that diffusers does not have.
    """
    rank = highest_rank(updates)
    tensors = {}
    for layer, pieces in updates.items():
        places = parts_of_sat_key(f"{layer}.weight")
        if not places:
            raise CheckpointError(f"diffusers has no layer for the adapter of {layer}")
        for place in places:
            update = _update_of_part(place, pieces)
            if update is not None:
                name = f"transformer.{place.diffusers_key.removesuffix('.weight')}"
                missing = rank - update.rank
                down, up = update.down.float(), update.scaled_up(1.0)
                tensors[f"{name}.lora_A.weight"] = torch.nn.functional.pad(
                    down, (0, 0, 0, missing)
                ).contiguous()
                tensors[f"{name}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing)).contiguous()
    modules = sorted({key.split(".lora_")[0].removeprefix("transformer.") for key in tensors})
    peft = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": modules}
    header = {PEFT_METADATA_KEY: json.dumps(peft), "format": "pt"}
    alpha = common_scale(updates) * rank
    if alpha > 0:
        header[TRAINED_ALPHA_KEY] = repr(alpha)
    return tensors, header


def _update_of_part(place: Part, pieces: tuple[LowRank | None, ...]) -> LowRank | None:
    if len(pieces) == place.pieces:
        return pieces[place.chunks[0]]
    # one update over the whole output, of which diffusers' layer gives some rows
    whole = pieces[0]
    assert whole is not None, "a layer with one adapter has it"
    rows = whole.up.chunk(place.pieces)
    return replace(whole, up=torch.cat([rows[index] for index in place.chunks]))


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


def _read_merged(
    weight: LazyTensor, parts: tuple[LowRank | None, ...], dtype: torch.dtype, shard: Shard | None
) -> Tensor:
    merged = weight.read(None).float() + whole_delta(parts, weight.shape[0], torch.float32)
    return shard_tensor(merged.to(dtype), shard)


def check_merged(written: LazyWeights, base: LazyWeights, updates: Updates) -> None:
    """Compares merged weights with a sum in fp64: each value must be its rounding to the written dtype.

    Raises:
        CheckpointError: A value differs by more.
    """
    for layer, parts in updates.items():
        key = f"{layer}.weight"
        merged, weight = written[key], base[key].double()
        expected = weight + whole_delta(parts, weight.shape[0], torch.float64)
        info = torch.finfo(merged.dtype)
        # half a step of the dtype, and what sums in fp32 lose before the cast
        size = weight.abs() + sum_of_sizes(parts, weight.shape[0])
        allowed = expected.abs() * (info.eps * 0.501) + size * 2.0**-19 + info.smallest_normal * info.eps
        wrong = ~((merged.double() - expected).abs() <= allowed)
        if wrong.any():
            raise CheckpointError(
                f"{written.where}: {int(wrong.sum())} values of {key} are not weight + scale * B @ A",
                expected="the sum of weight and update, rounded once",
                remedy="a value beyond the range of the dtype needs --dtype bf16 or fp32; else report it",
            )


def sum_of_sizes(parts: tuple[LowRank | None, ...], out_features: int) -> Tensor:
    """Returns the sum of the absolute values of all products in an update, in fp64."""
    sizes = tuple(part and LowRank(part.down.abs(), part.up.abs(), abs(part.scale)) for part in parts)
    return whole_delta(sizes, out_features, torch.float64)
