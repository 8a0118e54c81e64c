"""LoRA adapters as diffusers and PEFT load them, and the way back.

The way diffusers uses a file's alpha has changed between versions, and without one it takes alpha = rank; it
refuses keys such as `X.alpha` for CogVideoX. So exported files carry each layer's scale in its B matrices and
say alpha = rank, one rank for all: at scale 1.0 every reader, old or new, gets the update as it was trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.models.low_rank import LowRank, Parts, Updates, highest_rank, is_dora, scales_of
from sat_train.weights.diffusers_keys import Part, parts_of_sat_key
from sat_train.weights.lazy import LazyWeights
from sat_train.weights.lora_files import PEFT_METADATA_KEY

TRAINED_SCALE_KEY = "sat_train.lora_scale"  # one number, or one for each layer


def updates_to_peft(
    updates: Updates, base: LazyWeights | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Renames updates for diffusers.

    Args:
        updates: Whole updates under SAT's layers.
        base: The weights under the adapters, which DoRA's need: a file holds the lengths of rows, not their
            changes.

    Returns:
        fp32 tensors and safetensors metadata of a file for `pipe.load_lora_weights`. Lower ranks are padded
        with zeros to the highest, because readers differ in how they treat several ranks.

    Raises:
        CheckpointError: A layer that diffusers does not have.
    """
    rank = highest_rank(updates)
    tensors: dict[str, Tensor] = {}
    for layer, pieces in updates.items():
        places = parts_of_sat_key(f"{layer}.weight")
        if not places:
            raise CheckpointError(f"diffusers has no layer for the adapter of {layer}")
        for place in places:
            name = f"transformer.{place.diffusers_key.removesuffix('.weight')}"
            update = _update_of_part(place, pieces)
            if update is not None:
                tensors |= {f"{name}.{key}": tensor for key, tensor in _padded(update, rank).items()}
            if update is not None and update.magnitude is not None:
                assert base is not None, "the lengths of rows begin with those of the base"
                rows = _rows_of_part(place, base[f"{layer}.weight"].float())
                tensors[f"{name}.lora_magnitude_vector"] = update.lengths(rows)
    return tensors, _header(updates, tensors, rank)


def _padded(update: LowRank, rank: int) -> dict[str, Tensor]:
    missing = rank - update.rank
    down = torch.nn.functional.pad(update.down.float(), (0, 0, 0, missing))
    up = torch.nn.functional.pad(update.scaled_up(1.0), (0, missing))
    return {"lora_A.weight": down.contiguous(), "lora_B.weight": up.contiguous()}


def _header(updates: Updates, tensors: Mapping[str, Tensor], rank: int) -> dict[str, str]:
    modules = sorted({key.split(".lora_")[0].removeprefix("transformer.") for key in tensors})
    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": modules}
    if is_dora(updates):
        settings["use_dora"] = True
    header = {PEFT_METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    scales = {layer: scales_of({layer: parts}) for layer, parts in updates.items()}
    if all(len(own) == 1 and own[0] > 0 for own in scales.values()):
        numbers = {layer: own[0] for layer, own in scales.items()}
        is_common = len(set(numbers.values())) == 1
        header[TRAINED_SCALE_KEY] = json.dumps(next(iter(numbers.values())) if is_common else numbers)
    return {**header, "format": "pt"}


def _update_of_part(place: Part, pieces: Parts) -> LowRank | None:
    if len(pieces) == place.pieces:
        return pieces[place.chunks[0]]
    # one update over the whole output, of which diffusers' layer gives some rows
    whole = pieces[0]
    assert whole is not None, "a layer with one adapter has it"
    magnitude = None if whole.magnitude is None else _rows_of_part(place, whole.magnitude)
    return replace(whole, up=_rows_of_part(place, whole.up), magnitude=magnitude)


def _rows_of_part(place: Part, whole: Tensor) -> Tensor:
    rows = whole.chunk(place.pieces)
    return torch.cat([rows[index] for index in place.chunks])


def at_trained_scale(updates: Updates, metadata: Mapping[str, str], where: str) -> Updates:
    """Restores ranks and scales that our own export was trained with; the product B @ A stays the same."""
    if TRAINED_SCALE_KEY not in metadata:
        return updates
    expected = "a positive number, or one for each layer"
    with reading(f"{where}: {TRAINED_SCALE_KEY}", error=CheckpointError, expected=expected):
        scales = json.loads(metadata[TRAINED_SCALE_KEY])
        by_layer = {layer: float(scales[layer] if isinstance(scales, dict) else scales) for layer in updates}
    if not all(math.isfinite(scale) and scale > 0 for scale in by_layer.values()):
        raise CheckpointError(f"{where}: {TRAINED_SCALE_KEY} is not positive", expected=expected)
    return {
        layer: tuple(part and _at_scale(_without_padding(part), by_layer[layer]) for part in parts)
        for layer, parts in updates.items()
    }


def _at_scale(part: LowRank, scale: float) -> LowRank:
    return replace(part, up=part.scaled_up(scale), scale=scale)


def _without_padding(part: LowRank) -> LowRank:
    """Returns an update without the ranks at its end whose rows of A and columns of B are zero."""
    is_used = part.down.any(dim=1) | part.up.any(dim=0)
    rank = int(is_used.nonzero().max()) + 1 if is_used.any() else 1
    return replace(part, down=part.down[:rank], up=part.up[:, :rank])
