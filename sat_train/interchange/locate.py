"""Loads weights of any supported format under SAT's keys.

Transformer: a SAT folder, a run or a step of ours, a diffusers model folder or its `transformer/`, bare
`.safetensors` or `.pt`. VAE: the same kinds. The format is recognised by content. Tensors are read on access.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sat_train.checkpoint.consolidate import read_step
from sat_train.checkpoint.layout import MANIFEST, SAT_PREFIX, committed_steps, step_folder
from sat_train.checkpoint.manifest import BaseWeights, Manifest, read_manifest, verify_checkpoint
from sat_train.config.paths import expand_assets, shorten_assets
from sat_train.errors import CheckpointError
from sat_train.interchange.sources import WeightSource, find_weights, hash_weights
from sat_train.log import get_logger
from sat_train.weights.diffusers_keys import (
    transformer_from_diffusers,
)
from sat_train.weights.diffusers_vae_keys import is_diffusers_vae, vae_state_from_diffusers
from sat_train.weights.lazy import LazyWeights
from sat_train.weights.names import Shape, check_names_and_shapes
from sat_train.weights.readers import read_weight_files
from sat_train.weights.tensor_parallel import merge_slices, slice_weights

log = get_logger(__name__)

_VAE_PREFIX = "first_stage_model."
# Tables in SAT's files that the model computes, and embeddings that a video model does not use.
_UNUSED = ("freqs_sin", "freqs_cos", "position_embeddings.weight", "word_embeddings.weight")
# Other kinds of files, recognised by the beginning or a part of some key.
_KINDS = (
    ("a VAE", ("encoder.down", "decoder.up", "encoder.mid")),
    ("a T5 text encoder", ("shared.weight", "encoder.block.")),
    ("LoRA adapters", ("lora_A", "lora_down", "lora.down", "matrix_A", "transformer.transformer_blocks")),
)


@dataclass(frozen=True)
class Located:
    """Fixed location of a transformer's weights; a run directory would later mean a later step.

    Args:
        path: A path for `find_weights`; for a run, its newest step at the time.
        base: Base weights of a run with a frozen base; None for all other weights.
    """

    path: Path
    base: BaseWeights | None = None


def locate_weights(path: str | Path, *, load_base: str | Path | None = None) -> Located:
    """Finds weights, and the base under them if it was frozen, and verifies checkpoints of runs.

    Args:
        path: As for `read_transformer_weights`.
        load_base: Present place of frozen base weights; None: the recorded one.

    Raises:
        CheckpointError: The weights are missing or damaged, or base weights are gone or have changed.
    """
    source = find_weights(path)
    manifest = verify_checkpoint(source.path) if source.kind == "step" else None
    if manifest is not None and manifest.trainable_only:
        return Located(source.path.absolute(), find_base(source.path, manifest, load_base=load_base))
    if load_base is not None:
        log.warning("%s holds all of its weights: the base weights %s are not used", path, load_base)
    return Located(source.path.absolute())


def read_located(located: Located, *, ema: bool = False) -> LazyWeights:
    """Opens located weights: whole, under SAT's keys without prefix.

    Args:
        located: From `locate_weights`.
        ema: Read the average of the weights, from a run of ours that keeps one.

    Raises:
        CheckpointError: The file is damaged, or not a transformer's.
    """
    own = read_own_weights(find_weights(located.path), ema=ema)
    return own if located.base is None else read_base(located.base).overlaid(own)


def read_own_weights(source: WeightSource, *, ema: bool = False) -> LazyWeights:
    """Opens the weights inside a source: of a run with a frozen base, what it trained and added.

    Raises:
        CheckpointError: As `read_located`.
    """
    if source.kind == "step":
        weights = read_step(source.path, read_manifest(source.path), ema=ema)
        if not any(key.startswith(("transformer.", "mixins.", "time_embed.")) for key in weights):
            raise _wrong_kind(weights, "a CogVideoX transformer that sat_train trained")
        return weights
    if ema:
        raise CheckpointError(
            f"{source.path} has no average of the weights, because it is not a run of sat_train"
        )
    if source.kind == "sat":
        slices = [_under_sat_keys(read_weight_files([file])) for file in source.files]
        return merge_slices(slices, where=str(source.path))
    return _under_sat_keys(read_weight_files(source.files))


def read_transformer_weights(
    path: str | Path,
    *,
    model_rank: int = 0,
    model_size: int = 1,
    ema: bool = False,
    load_base: str | Path | None = None,
) -> LazyWeights:
    """Locates and opens the weights of a transformer.

    Args:
        path: A SAT folder or step, a run or step of ours, a diffusers model folder or its `transformer/`, a
            file.
        model_rank: Rank on the model axis.
        model_size: Ranks on the model axis; only this rank's slices are read.
        ema: Read the average of the weights, from a run of ours that keeps one.
        load_base: Present place of frozen base weights.

    Returns:
        Weights under SAT's keys without prefix; of a run with a frozen base, its base together with the rest.

    Raises:
        CheckpointError: The weights are missing, damaged or not a transformer's, or base weights have
            changed.
    """
    whole = read_located(locate_weights(path, load_base=load_base), ema=ema)
    return slice_weights(whole, rank=model_rank, size=model_size)


def find_base(folder: Path, manifest: Manifest, *, load_base: str | Path | None = None) -> BaseWeights:
    """Finds the frozen base weights of a run, by path and then by hash.

    Args:
        folder: The step, for messages.
        manifest: Its manifest.
        load_base: Their present place; None: the recorded one. In a run directory, the step with the recorded
            hash is used.

    Returns:
        Their absolute path and their hash.

    Raises:
        CheckpointError: They are missing, or have another hash.
    """
    recorded = manifest.base_weights
    if recorded is None:
        raise CheckpointError(f"{folder} lacks its frozen weights and does not name them")
    remedy = "give their present place: args.load_base, or --load-base of sat-train convert"
    problem = f"{folder} was trained on the base {recorded.source} (sha256 {recorded.sha256[:12]})"
    place = recorded.source if load_base is None else load_base
    mismatches = []
    try:
        for candidate in _steps_of(place):
            sha256 = hash_weights(candidate)
            if sha256 == recorded.sha256:
                return _recorded(candidate, sha256)
            mismatches.append(f"{candidate} has sha256 {sha256[:12]}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{problem}\n  {error.problem}", expected="the same weights", remedy=remedy
        ) from error
    changed = "which has changed" if load_base is None else "but other weights were given"
    raise CheckpointError(
        f"{problem}, {changed}: {'; '.join(mismatches[:3])}",
        expected="the base weights that the run was trained on",
        remedy=remedy,
    )


def base_weights_at(path: str | Path) -> BaseWeights:
    """Returns the record of base weights that a run saves: the absolute path and the hash.

    Raises:
        CheckpointError: There are no weights at the path.
    """
    return _recorded(path, hash_weights(path))


def _recorded(path: str | Path, sha256: str) -> BaseWeights:
    """Returns the record of weights; shipped files keep their `asset:` name, the same on every machine."""
    return BaseWeights(source=str(shorten_assets(str(find_weights(path).path.absolute()))), sha256=sha256)


def read_base(base: BaseWeights, above: frozenset[Path] = frozenset()) -> LazyWeights:
    """Opens base weights, which may be those of a run that has a frozen base itself.

    Args:
        base: The weights.
        above: Steps that lie over them, none of which may be their base.

    Raises:
        CheckpointError: They are missing, damaged or have changed.
    """
    source = find_weights(base.source)
    if source.kind == "step" and (manifest := read_manifest(source.path)).trainable_only:
        if source.path in above:
            raise CheckpointError(
                f"{source.path} names itself as its base weights", remedy="use another step"
            )
        below = read_base(find_base(source.path, manifest), above | {source.path})
        return below.overlaid(read_own_weights(source))
    return read_own_weights(source)


def _steps_of(place: str | Path) -> list[str]:
    """Returns the steps of a run directory, newest first, and any other path unchanged."""
    folder = Path(expand_assets(str(place))).expanduser()
    steps = [] if (folder / MANIFEST).is_file() else committed_steps(folder)
    return [str(step_folder(folder, step)) for step in steps] or [str(place)]


def read_vae_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a video VAE.

    Args:
        path: SAT's `3d-vae.pt` or its folder, a SAT folder that holds `first_stage_model.*`, a diffusers
            model folder or its `vae/`.

    Returns:
        `encoder.*` and `decoder.*` under SAT's names, on the CPU.

    Raises:
        CheckpointError: The weights are missing, damaged, or not a VAE's.
    """
    source = find_weights(path, part="vae")
    if source.kind == "step":
        raise CheckpointError(
            f"{path} is a run of sat_train, which does not train the VAE", expected="weights of a VAE"
        )
    weights = read_weight_files(source.files[:1] if source.kind == "sat" else source.files)
    if any(key.startswith(_VAE_PREFIX) for key in weights):
        weights = weights.select(lambda key: _after(_VAE_PREFIX, key))
    weights = weights.select(lambda key: None if key.startswith("loss.") else key)
    if not any(key.startswith(("encoder.conv_in", "decoder.conv_in")) for key in weights):
        raise _wrong_kind(weights, "a video VAE: encoder.* and decoder.*")
    tensors = {key: weights[key].clone() for key in weights}
    return vae_state_from_diffusers(tensors) if is_diffusers_vae(tensors) else tensors


def load_weights(module: torch.nn.Module, weights: LazyWeights, *, may_lack: Collection[str] = ()) -> None:
    """Copies weights into a module, one tensor at a time, after all names and shapes have been compared.

    Args:
        module: Module whose parameters and buffers are filled; they keep their device and dtype.
        weights: From `read_transformer_weights`, for this rank's slice.
        may_lack: As for `check_names_and_shapes`.

    Raises:
        CheckpointError: As `check_names_and_shapes`; nothing is copied.
    """
    check_weights(module, weights, may_lack=may_lack)
    copy_weights(module, weights, weights)


def check_weights(module: torch.nn.Module, weights: LazyWeights, *, may_lack: Collection[str] = ()) -> None:
    """Compares names and shapes of weights with those of a module.

    Raises:
        CheckpointError: As `check_names_and_shapes`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    file_shapes = {name: unflattened(shape, shapes.get(name)) for name, shape in weights.shapes.items()}
    check_names_and_shapes(shapes, file_shapes, where=weights.where, may_lack=may_lack)


@torch.no_grad()
def copy_weights(module: torch.nn.Module, weights: LazyWeights, names: Iterable[str]) -> None:
    """Copies some of the weights into a module, whose names and shapes have been compared."""
    targets = module.state_dict()
    for name in names:
        targets[name].copy_(weights[name].reshape(targets[name].shape))


def unflattened(shape: Shape, expected: Shape | None) -> Shape:
    """Returns the expected shape if `found` is the same weight flattened to a linear layer's, else `found`.

    CogVideo's released 1.0 weights hold the patch embedding as [d, c, 2, 2], its later code as [d, 4 c].
    """
    is_flat = expected is not None and len(expected) > 2 == len(shape)
    if is_flat and expected and shape == (expected[0], math.prod(expected[1:])):
        return expected
    return shape


def _under_sat_keys(weights: LazyWeights) -> LazyWeights:
    if any(key.startswith(SAT_PREFIX) for key in weights):
        weights = weights.select(lambda key: _after(SAT_PREFIX, key))
    if any(key.startswith("transformer_blocks.") for key in weights):
        return transformer_from_diffusers(weights)
    if not any(key.startswith("transformer.layers.") for key in weights):
        raise _wrong_kind(weights, "a CogVideoX transformer, in SAT's or diffusers' names")
    return weights.select(lambda key: None if key.endswith(_UNUSED) else key.replace(".original.", "."))


def _after(prefix: str, key: str) -> str | None:
    return key[len(prefix) :] if key.startswith(prefix) else None


def _wrong_kind(weights: LazyWeights, expected: str) -> CheckpointError:
    for kind, signs in _KINDS:
        if any(sign in key for key in weights for sign in signs):
            remedy = "name it in args.load_lora (convert: --lora)" if "LoRA" in kind else "check the path"
            return CheckpointError(f"{weights.where} holds {kind}", expected=expected, remedy=remedy)
    names = ", ".join(list(weights)[:3])
    return CheckpointError(f"{weights.where} holds other weights: {names}, ...", expected=expected)
