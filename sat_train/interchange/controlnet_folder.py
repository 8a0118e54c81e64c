"""Control branches in the layout of TheDenk/cogvideox-controlnet: a folder that its pipelines load.

The folder holds `config.json` and `diffusion_pytorch_model.safetensors`. Blocks and embeddings have the names
of diffusers there.

Source: TheDenk/cogvideox-controlnet@e21a4a3 `cogvideo_controlnet.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sat_train.checkpoint.consolidate import trained_dtype
from sat_train.checkpoint.manifest import read_manifest
from sat_train.config import ModelSpec
from sat_train.config.parts.module_parts import PixelControlBranchParams
from sat_train.errors import CheckpointError
from sat_train.files import read_text, reading, write_text
from sat_train.interchange.adapters import without_adapters
from sat_train.interchange.diffusers_folder import STEM
from sat_train.interchange.locate import read_own_weights
from sat_train.interchange.module_files import ModuleFile, ModuleRecord, save_modules
from sat_train.interchange.sources import WeightSource, find_weights
from sat_train.log import get_logger
from sat_train.weights.diffusers_keys import transformer_from_diffusers, transformer_to_diffusers
from sat_train.weights.lazy import LazyWeights, check_same
from sat_train.weights.readers import read_weight_files
from sat_train.weights.safetensors_out import Progress, write_safetensors

log = get_logger(__name__)

TARGET = "PixelControlBranch"
_CLASS = "CogVideoXControlnet"
_DEFAULT_NAME = "branch"  # as in configs/condition/control_pixels.yaml
_TEXT_WIDTH = 4096  # their class has no setting for it
_POSITIONS = "patch_embed.pos_embedding"  # a table that the branch computes
_MOST_CONFIG_BYTES = 1_000_000
# settings of their class with the only value that the branch here has; a file without one means it
_FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "patch_size": 2,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": False,  # its positions are added; the rotation is the base's
}
# beginnings of names there and here; below the second ones stand the names of a transformer
_RENAMED = (
    ("controlnet_encode_first.0.", "embed.encoder.first.conv."),
    ("controlnet_encode_first.1.", "embed.encoder.first.norm."),
    ("controlnet_encode_second.0.", "embed.encoder.second.conv."),
    ("controlnet_encode_second.1.", "embed.encoder.second.norm."),
    ("out_projectors.", "per_block."),
)
_OF_TRANSFORMER = (
    ("transformer.", "stack.transformer."),
    ("mixins.adaln_layer.", "stack.adaln_layer."),
    ("mixins.patch_embed.", "embed.patch_embed."),
    ("time_embed.", "embed.time_embed."),
)


def controlnet_weights(branch: LazyWeights) -> LazyWeights:
    """Returns the weights of a branch under the names of their class.

    Args:
        branch: Whole weights under the names of `PixelControlBranch`.
    """
    back = [(ours, theirs) for theirs, ours in _RENAMED]
    own = branch.select(lambda key: _renamed(key, back))
    shared = branch.select(lambda key: _renamed(key, [(ours, sat) for sat, ours in _OF_TRANSFORMER]))
    assert len(own) + len(shared) == len(branch), f"{branch.where} has weights of another module"
    return own.overlaid(transformer_to_diffusers(shared))


def branch_weights(controlnet: LazyWeights) -> LazyWeights:
    """Returns weights of their class under the names of `PixelControlBranch`.

    Raises:
        CheckpointError: A weight is not one of theirs, or a part of a fused one is missing.
    """
    own = controlnet.select(lambda key: _renamed(key, _RENAMED))
    shared = controlnet.select(lambda key: None if key == _POSITIONS or _renamed(key, _RENAMED) else key)
    sat = transformer_from_diffusers(shared)
    if strays := [key for key in sat if _renamed(key, _OF_TRANSFORMER) is None]:
        raise CheckpointError(f"{controlnet.where} holds {strays[0]}, which a {_CLASS} does not have")
    return own.overlaid(sat.select(lambda key: _renamed(key, _OF_TRANSFORMER)))


def _renamed(key: str, beginnings: Sequence[tuple[str, str]]) -> str | None:
    return next((new + key.removeprefix(old) for old, new in beginnings if key.startswith(old)), None)


def write_controlnet(
    source: WeightSource,
    folder: Path,
    model: ModelSpec,
    *,
    names: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    ema: bool = False,
    metadata: Mapping[str, str],
    progress: Callable[[int], Progress],
) -> None:
    """Writes a branch of a run of ours in their layout, and reads it back.

    Args:
        source: A verified step of the run.
        folder: Existing folder.
        model: The run's model.
        names: Name of the module; none: the only one of its kind.
        dtype: Dtype of the written weights; None: the precision that the run computed in.
        ema: Write the average of the weights.
        metadata: The origin, for the header.
        progress: As for `convert`.

    Raises:
        CheckpointError: The run has no such module, or one that their class cannot be.
    """
    name = _branch_of(model, names, source.path)
    params = model.modules[name].params
    assert isinstance(params, PixelControlBranchParams), f"{name} is a {TARGET}"
    _check_published(model, source.path)
    prefix = f"mixins.{name}."
    own = without_adapters(read_own_weights(source, ema=ema))
    branch = own.select(lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    theirs = controlnet_weights(branch.cast(dtype or trained_dtype(read_manifest(source.path))))
    header, report = {**metadata, "sat_train.module": name}, progress(theirs.num_bytes)
    write_safetensors(folder, STEM, theirs, metadata=header, progress=report)
    write_text(folder / "config.json", json.dumps(controlnet_config(params, model), indent=2) + "\n")
    check_same(theirs, read_weight_files(find_weights(folder).files))
    log.info("%s was trained with controlnet_weights=%g: give it to the pipeline", name, params.weight)


def _branch_of(model: ModelSpec, names: Sequence[str], where: Path) -> str:
    branches = [name for name, module in model.modules.items() if module.target == TARGET]
    chosen = [name for name in branches if not names or name in names]
    if len(chosen) == 1 and set(names) <= set(chosen):
        return chosen[0]
    others = ", ".join(f"{name} ({module.target})" for name, module in model.modules.items())
    raise CheckpointError(
        f"{where} has the modules {others or 'none'}",
        expected=f"one {TARGET}; no other module is the network of {_CLASS}",
        remedy="name one with --module" if len(branches) > 1 else "--to modules writes any module",
    )


def _check_published(model: ModelSpec, where: Path) -> None:
    """Raises for a base whose branch their class cannot be; text of another width is only logged."""
    faults = {
        "CogVideoX 1.5: their patches have one frame": model.patch != (1, 2, 2),
        "no norms of queries and keys": not model.qk_norm,
        "norms without weights": not model.affine_norms,
        f"{model.temporal_compression} frames in a latent frame": model.temporal_compression != 4,
    }
    if found := [fault for fault, is_one in faults.items() if is_one]:
        raise CheckpointError(
            f"{where} has a branch that {_CLASS} cannot be ({'; '.join(found)})",
            expected="a branch next to CogVideoX-2B or 5B",
            remedy="--to modules writes it for sat_train",
        )
    if model.text_width != _TEXT_WIDTH:
        log.warning(
            "%s reads texts of width %d, and this model's have %d: it will not load the folder",
            _CLASS,
            _TEXT_WIDTH,
            model.text_width,
        )


def controlnet_config(params: PixelControlBranchParams, model: ModelSpec) -> dict[str, Any]:
    """Returns their `config.json`."""
    _, height, width = model.trained_latent
    area = model.temporal_compression * model.spatial_compression**2
    return {
        "_class_name": _CLASS,
        "_diffusers_version": "0.31.0",  # the least that their scripts ask for
        **_FIXED,
        "attention_head_dim": model.head_width,
        "downscale_coef": model.spatial_compression,
        "in_channels": model.condition_widths[params.condition] // area,
        "max_text_seq_length": model.text_length,
        "num_attention_heads": params.heads or model.heads,
        "num_layers": params.blocks,
        "out_proj_dim": model.width if params.projections else None,
        "sample_frames": model.trained_frames,
        "sample_height": height,
        "sample_width": width,
        "time_embed_dim": model.time_width,
        "vae_channels": model.out_channels,
    }


def is_controlnet(path: Path) -> bool:
    """Returns whether a path is a folder of theirs."""
    file = path / "config.json"
    if not file.is_file():
        return False
    with reading(file, error=CheckpointError, expected="the configuration of a model"):
        config = json.loads(read_text(file, limit=_MOST_CONFIG_BYTES))
    return isinstance(config, dict) and config.get("_class_name") == _CLASS


def write_as_modules(
    path: Path,
    folder: Path,
    *,
    names: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str],
) -> Path:
    """Writes a branch of theirs as a file of modules, which `args.load_modules` takes, and reads it back.

    Args:
        path: A folder of theirs.
        folder: Existing folder for the file.
        names: Name of the module in the model; none: `branch`.
        dtype: Dtype of the written weights; None: that of the source.
        metadata: The origin, for the header.

    Raises:
        CheckpointError: It is damaged, or its settings are not those of a `PixelControlBranch`.
    """
    params = _params_of(path / "config.json")
    if len(names) > 1:
        raise CheckpointError(f"{path} holds one branch", expected="--module with the name it is to have")
    name = names[0] if names else _DEFAULT_NAME
    branch = branch_weights(read_weight_files(find_weights(path).files).cast(dtype))
    chosen = branch.select(lambda key: f"mixins.{name}.{key}")
    settings = json.dumps({name: {"target": TARGET, "params": params}})
    log.info("its settings, with a condition ControlPixels:\n  model.modules: %s", settings)
    del params["heads"]  # null means the same in a model of this width: shapes decide
    record = ModuleFile((ModuleRecord(name, TARGET, params),), extensions={}, keys=tuple(chosen))
    return save_modules(folder, chosen, record, metadata=metadata)


def _params_of(file: Path) -> dict[str, Any]:
    """Returns the settings of `PixelControlBranch` that their `config.json` names.

    Raises:
        CheckpointError: Their class has other settings there than the branch here.
    """
    with reading(file, error=CheckpointError, expected=f"the configuration of a {_CLASS}"):
        config = dict(json.loads(read_text(file, limit=_MOST_CONFIG_BYTES)))
        differing = [
            f"{key}: {config[key]} there, {value} here"
            for key, value in _FIXED.items()
            if config.get(key, value) != value
        ]
        has_projections = config.get("out_proj_dim") is not None
        heads = int(config.get("num_attention_heads", 30))
        blocks = int(config.get("num_layers", 8))
    if differing:
        raise CheckpointError(
            f"{file} describes another network than {TARGET}: {'; '.join(differing)}",
            expected="a branch as it is published for CogVideoX-2B and 5B",
        )
    return {"blocks": blocks, "heads": heads, "projections": has_projections}
