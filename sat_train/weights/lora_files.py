"""Reads LoRA files of other trainers: maps keys to modules, and finds the scale of each update.

Source: huggingface/peft@0.21 `LoraConfig`, `utils/save_and_load.py`; huggingface/diffusers@0.42
`loaders/lora_conversion_utils.py`; kohya-ss/sd-scripts `networks/lora.py` for the names with underscores.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sat_train.errors import CheckpointError
from sat_train.files import read_text, reading
from sat_train.models.low_rank import LowRank
from sat_train.weights.diffusers_keys import module_of_underscores
from sat_train.weights.lazy import LazyWeights
from sat_train.weights.readers import read_metadata

# Where diffusers looks for PEFT's configuration in a safetensors header.
PEFT_METADATA_KEY = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"
_MOST_CONFIG_BYTES = 1_000_000

_SIDE = re.compile(r"(?P<module>.+?)[._]lora(?:_|\.)(?P<side>A|B|down|up)(?:\.default)?(?:\.weight)?")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_PREFIXES = re.compile(
    r"base_model\.model\.|module\.|(?:model\.)?diffusion_model\.|lora_(?:unet|transformer)_+"
    r"|transformer\.(?=transformer\.|transformer_blocks\.|patch_embed\.|time_embedding\.|ofs_embedding\.|norm_|proj_out)"
)
_DOWN = ("A", "down")
# Initialisations whose saved adapters refer to another base than the released weights.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "eva")


@dataclass
class _AdapterPair:
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    keys: list[str] = field(default_factory=list)


def holds_lora(weights: LazyWeights) -> bool:
    """Returns whether the keys are those of a LoRA file."""
    return any(_SIDE.fullmatch(key) for key in weights)


def read_lora_modules(weights: LazyWeights, file: Path) -> dict[str, LowRank]:
    """Reads a LoRA of diffusers, PEFT or kohya.

    Args:
        weights: The tensors of the file.
        file: The file, for its header and for PEFT's `adapter_config.json` next to it.

    Returns:
        The update of each module, under diffusers' names (or SAT's, if the file uses those).

    Raises:
        CheckpointError: An unknown key, half a pair, or a kind of adapter that is not LoRA.
    """
    config = _read_config(file)  # says which kind of adapter it is, where unknown keys do not
    modules: dict[str, _AdapterPair] = {}
    unknown = [key for key in weights if not _sort(key, weights, modules)]
    if unknown:
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{weights.where}: {len(unknown)} keys do not belong to a LoRA: {names}",
            expected="pairs such as lora_A, lora_B or lora_down, lora_up, and alphas",
            remedy="export the adapter as plain LoRA, without DoRA, biases or whole weights",
        )
    return {module: _low_rank(module, parts, config, weights.where) for module, parts in modules.items()}


def _sort(key: str, weights: LazyWeights, modules: dict[str, _AdapterPair]) -> bool:
    """Adds a tensor to its module; returns False for an unknown key."""
    side, alpha = _SIDE.fullmatch(key), _ALPHA.fullmatch(key)
    match = side or alpha
    if match is None:
        return False
    update = modules.setdefault(_module(match["module"]), _AdapterPair())
    update.keys.append(key)
    tensor = weights[key]
    if side is None:
        if tensor.numel() != 1 or update.alpha is not None:
            return False
        update.alpha = float(tensor)
        return True
    name = "down" if side["side"] in _DOWN else "up"
    if tensor.dim() != 2 or getattr(update, name) is not None:
        return False
    setattr(update, name, tensor)
    return True


def _module(name: str) -> str:
    """Returns a module's name without the prefixes of trainers, with dots for kohya's underscores."""
    bare = name
    while match := _PREFIXES.match(bare):
        bare = bare[match.end() :]
    return module_of_underscores(bare) or bare.replace(".processor.", ".")


def _low_rank(module: str, pair: _AdapterPair, config: Mapping[str, Any], where: str) -> LowRank:
    if pair.down is None or pair.up is None:
        raise CheckpointError(
            f"{where}: the adapter of {module} has only one of its two matrices: {', '.join(pair.keys)}"
        )
    rank = pair.down.shape[0]
    if rank != pair.up.shape[1] or rank == 0:
        shapes = f"{list(pair.down.shape)} and {list(pair.up.shape)}"
        raise CheckpointError(f"{where}: the matrices of {module} do not multiply: {shapes}")
    alpha = pair.alpha if pair.alpha is not None else _configured_alpha(module, config, where)
    if alpha is None:
        return LowRank(pair.down, pair.up, 1.0)  # every reader's rule for a file that does not say
    if not math.isfinite(alpha):
        raise CheckpointError(f"{where}: the alpha of {module} is {alpha}", expected="a finite number")
    root = config.get("use_rslora") and pair.alpha is None
    return LowRank(pair.down, pair.up, alpha / (math.sqrt(rank) if root else rank))


def _configured_alpha(module: str, config: Mapping[str, Any], where: str) -> float | None:
    with reading(where, error=CheckpointError, expected="numbers for lora_alpha and alpha_pattern"):
        for pattern, alpha in dict(config.get("alpha_pattern") or {}).items():
            name = _module(str(pattern).removeprefix("^"))
            if not re.fullmatch(r"[\w.]+", name):
                raise ValueError(f"alpha_pattern '{pattern}' is not a module's name")
            if module == name or module.endswith(f".{name}"):
                return float(alpha)
        alpha = config.get("lora_alpha")
        return None if alpha is None else float(alpha)


def _read_config(file: Path) -> dict[str, Any]:
    """Returns PEFT's settings: from the file next to the weights, else from their header, else none."""
    config_file = file.parent / _PEFT_CONFIG
    source = config_file if config_file.exists() and file.name.startswith("adapter_model") else file
    with reading(source, error=CheckpointError, expected="PEFT's settings, a JSON object"):
        if source == config_file:
            text = read_text(config_file, limit=_MOST_CONFIG_BYTES)
        else:
            text = read_metadata(file).get(PEFT_METADATA_KEY, "{}")
        settings = {str(key).removeprefix("transformer."): value for key, value in json.loads(text).items()}
    _check_plain_lora(settings, source)
    return settings


def _check_plain_lora(settings: Mapping[str, Any], file: Path) -> None:
    start = str(settings.get("init_lora_weights", "")).lower()
    kinds = {
        f"peft_type {settings.get('peft_type')}": settings.get("peft_type", "LORA") != "LORA",
        "use_dora": bool(settings.get("use_dora")),
        f"init_lora_weights {start}": start.startswith(_OTHER_BASE),
    }
    for kind, is_other in kinds.items():
        if is_other:
            raise CheckpointError(
                f"{file} says {kind}",
                expected="a plain LoRA: weight + alpha / r * B @ A on the released weights",
                remedy="of a run of sat_train, name the run or its step instead of its export",
            )
