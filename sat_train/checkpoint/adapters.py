"""LoRA adapters between SAT's names and PEFT's as diffusers loads them, and merged into the weights.

SAT scales an update by alpha / rank and keeps alpha beside it. What diffusers makes of a file's alpha has
changed between versions, and without one it takes alpha = rank. So exported files carry the scale in their B
matrices and say alpha = rank: every reader, old or new, gets the update as it was trained at scale 1.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_train.checkpoint.diffusers_keys import Part, part_of_diffusers_key, parts_of_sat_key
from sat_train.checkpoint.lazy import Cut, Entry, LazyWeights, cut_tensor, from_tensors
from sat_train.checkpoint.readers import read_metadata, read_weight_files
from sat_train.checkpoint.sources import find_weights
from sat_train.checkpoint.tensor_parallel import slice_weights
from sat_train.checkpoint.weights import read_transformer_weights
from sat_train.errors import CheckpointError

RANK_KEY = "mixins.lora.rank"
ALPHA_KEY = "mixins.lora.alpha"
# Where diffusers looks for PEFT's configuration in a safetensors header.
PEFT_METADATA_KEY = "lora_adapter_metadata"
TRAINED_ALPHA_KEY = "sat_train.lora_alpha"
_ADAPTER = re.compile(r"(.+)\.matrix_([AB])\.(\d+)")
_PEFT = re.compile(r"(?:transformer\.)?(.+)\.lora_([AB])\.weight")
_DEFAULT_ALPHA = 1.0  # SAT's, whose checkpoints do not hold it


def is_adapter_key(key: str) -> bool:
    """Says whether a SAT key belongs to an adapter."""
    return bool(_ADAPTER.fullmatch(key)) or key in (RANK_KEY, ALPHA_KEY)


def read_adapter_weights(path: str | Path, *, model_rank: int = 0, model_size: int = 1) -> LazyWeights:
    """Opens adapters: of a run or step of ours, of SAT, or a diffusers/PEFT file or its folder.

    Args:
        path: Where they are.
        model_rank: Rank on the model axis.
        model_size: Ranks on the model axis; only this rank's slices are read.

    Returns:
        `...matrix_A.i`, `...matrix_B.i`, and rank and alpha where the file says them.

    Raises:
        CheckpointError: Nothing there, damaged, or no adapters inside.
    """
    source = find_weights(path, part="lora")
    if source.kind == "files":
        found = read_weight_files(source.files)
        if any(_PEFT.fullmatch(key) for key in found):
            tensors = adapters_from_peft(found, read_metadata(source.files[0]))
            return slice_weights(from_tensors(tensors, where=found.where), rank=model_rank, size=model_size)
    weights = read_transformer_weights(path, model_rank=model_rank, model_size=model_size)
    adapters = weights.select(lambda key: key if is_adapter_key(key) else None)
    if not adapters:
        raise CheckpointError(f"{path} holds no LoRA adapters", expected="a LoRA run, or a file of adapters")
    return adapters


def adapters_to_peft(adapters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Renames adapters for diffusers.

    Args:
        adapters: Whole adapters under SAT's keys.

    Returns:
        Tensors and safetensors metadata of a file for `pipe.load_lora_weights`.

    Raises:
        CheckpointError: A layer that diffusers does not have, or no adapters at all.
    """
    layers = _layers(adapters)
    if not layers:
        raise CheckpointError("there are no LoRA adapters to export", remedy="leave out --lora")
    rank, alpha = rank_and_alpha(adapters)
    tensors = {}
    for layer, (downs, ups) in layers.items():
        parts = parts_of_sat_key(f"{layer}.weight")
        if not parts:
            raise CheckpointError(f"diffusers has no layer for the adapter of {layer}")
        for part in parts:
            down, up = _pair_of_part(part, downs, ups)
            name = f"transformer.{part.diffusers_key.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = down.contiguous()
            tensors[f"{name}.lora_B.weight"] = (up * (alpha / rank)).contiguous()
    modules = sorted({key.split(".lora_")[0].removeprefix("transformer.") for key in tensors})
    peft = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": modules}
    return tensors, {PEFT_METADATA_KEY: json.dumps(peft), TRAINED_ALPHA_KEY: repr(alpha), "format": "pt"}


def adapters_from_peft(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Renames a diffusers/PEFT file's adapters for SAT: undoes `adapters_to_peft`.

    Raises:
        CheckpointError: Adapters of several ranks, of layers that SAT fuses and the file splits unevenly, or
            half a pair.
    """
    peft = _peft_settings(metadata)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        match = _PEFT.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{key} is not of a LoRA adapter", expected="...lora_A.weight and ...lora_B.weight"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensors[key]
    rank = _common_rank(pairs)
    scale = float(peft.get("lora_alpha", rank)) / rank
    alpha = float(metadata.get(TRAINED_ALPHA_KEY, scale * rank))
    result: dict[str, Tensor] = {RANK_KEY: torch.tensor(rank), ALPHA_KEY: torch.tensor(alpha)}
    for module, pair in pairs.items():
        layer, index = _sat_place(module, pairs)
        result[f"{layer}.matrix_A.{index}"] = pair["A"].float()
        result[f"{layer}.matrix_B.{index}"] = pair["B"].float() * (scale * rank / alpha)
    return result


def merge_adapters(weights: LazyWeights) -> LazyWeights:
    """Returns the weights with their adapters added, each when it is read, in the dtype of the weight.

    Raises:
        CheckpointError: There are no adapters among them.
    """
    layers = _layers(weights.select(lambda key: key if is_adapter_key(key) else None))
    if not layers:
        raise CheckpointError(
            f"{weights.where} holds no LoRA adapters to merge", remedy="leave out --merge-lora"
        )
    rank, alpha = rank_and_alpha(weights)
    entries = {key: entry for key, entry in weights.entries.items() if not is_adapter_key(key)}
    for layer, (downs, ups) in layers.items():
        key = f"{layer}.weight"
        read = partial(_read_merged, entries[key], downs, ups, alpha / rank)
        entries[key] = Entry(entries[key].shape, entries[key].dtype, read)
    return LazyWeights(entries, where=weights.where)


def rank_and_alpha(adapters: Mapping[str, Tensor]) -> tuple[int, float]:
    """Returns the rank, from the shapes, and alpha: the stored one, or SAT's 1."""
    rank = next(adapters[key].shape[0] for key in adapters if (m := _ADAPTER.fullmatch(key)) and m[2] == "A")
    alpha = float(adapters[ALPHA_KEY]) if ALPHA_KEY in adapters else _DEFAULT_ALPHA
    return int(rank), alpha


def _read_merged(
    weight: Entry, downs: list[Tensor], ups: list[Tensor], scale: float, cut: Cut | None
) -> Tensor:
    update = torch.cat([up.float() @ down.float() for down, up in zip(downs, ups, strict=True)]) * scale
    return cut_tensor((weight.read(None).float() + update).to(weight.dtype), cut)


def _layers(adapters: Mapping[str, Tensor]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Returns for each adapted layer its A and its B matrices, in the order of the parts of its output."""
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key in adapters:
        if match := _ADAPTER.fullmatch(key):
            found.setdefault(match[1], {"A": {}, "B": {}})[match[2]][int(match[3])] = adapters[key]
    for layer, sides in found.items():
        if sides["A"].keys() != sides["B"].keys():
            raise CheckpointError(
                f"the adapter of {layer} has {len(sides['A'])} A and {len(sides['B'])} B matrices"
            )
    return {
        layer: ([sides["A"][i] for i in sorted(sides["A"])], [sides["B"][i] for i in sorted(sides["B"])])
        for layer, sides in found.items()
    }


def _pair_of_part(part: Part, downs: list[Tensor], ups: list[Tensor]) -> tuple[Tensor, Tensor]:
    if len(downs) == part.pieces:
        return downs[part.chunks[0]], ups[part.chunks[0]]
    # one update over the whole output, of which diffusers' layer gives some rows
    rows = ups[0].chunk(part.pieces)
    return downs[0], torch.cat([rows[index] for index in part.chunks])


def _sat_place(module: str, pairs: Mapping[str, object]) -> tuple[str, int]:
    part = part_of_diffusers_key(f"{module}.weight")
    if part is None:
        raise CheckpointError(f"{module} is no layer of a CogVideoX transformer", expected="a CogVideoX LoRA")
    parts = parts_of_sat_key(part.sat_key)
    if len(parts) != part.pieces:
        raise CheckpointError(f"SAT fuses {module} with other layers that have adapters of their own")
    missing = [p.diffusers_key for p in parts if p.diffusers_key.removesuffix(".weight") not in pairs]
    if missing:
        raise CheckpointError(f"SAT adapts q, k and v together, and {', '.join(missing)} has no adapter")
    return part.sat_key.removesuffix(".weight"), part.chunks[0]


def _common_rank(pairs: Mapping[str, Mapping[str, Tensor]]) -> int:
    half = [module for module, pair in pairs.items() if len(pair) != 2]
    if half:
        raise CheckpointError(f"the adapter of {half[0]} has only one of its two matrices")
    ranks = {int(pair["A"].shape[0]) for pair in pairs.values()}
    if len(ranks) != 1:
        raise CheckpointError(f"adapters of ranks {sorted(ranks)}", expected="one rank for all layers")
    return ranks.pop()


def _peft_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    settings = json.loads(metadata.get(PEFT_METADATA_KEY, "{}"))
    return {key.removeprefix("transformer."): value for key, value in settings.items()}
