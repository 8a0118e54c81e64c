"""Weights in, from whatever people have, under SAT's keys.

Transformer: a SAT folder, a run or a step of ours, a diffusers model folder or its `transformer/`, bare
`.safetensors` or `.pt`. VAE: the same kinds. The format is found by looking. Nothing is read before it is
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    Part,
    part_of_diffusers_key,
    parts_of_sat_key,
    transformer_from_diffusers,
)
from sat_train.weights.diffusers_vae_keys import is_diffusers_vae, vae_state_from_diffusers
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard
from sat_train.weights.names import Shape, check_names_and_shapes
from sat_train.weights.readers import read_weight_files
from sat_train.weights.tensor_parallel import merge_slices, slice_weights

log = get_logger(__name__)

_VAE_PREFIX = "first_stage_model."
# Tables in SAT's files that the model computes, and embeddings that a video has no use for.
_UNUSED = ("freqs_sin", "freqs_cos", "position_embeddings.weight", "word_embeddings.weight")
# What else people have, told by how some key begins or what it contains.
_KINDS = (
    ("a VAE", ("encoder.down", "decoder.up", "encoder.mid")),
    ("a T5 text encoder", ("shared.weight", "encoder.block.")),
    ("LoRA adapters", ("lora_A", "lora_down", "lora.down", "matrix_A", "transformer.transformer_blocks")),
)


@dataclass(frozen=True)
class Located:
    """Where the weights of a transformer are, fixed: a run continues, its folder then means a later step.

    Args:
        path: What `find_weights` understands; of a run, the step that was its newest.
        base: What lies under the adapters of a LoRA run; None for all other weights.
    """

    path: Path
    base: BaseWeights | None = None


def locate_weights(path: str | Path, *, load_base: str | Path | None = None) -> Located:
    """Finds weights, and for a LoRA run those that its adapters stand on, and verifies what is a run's.

    Args:
        path: As for `read_transformer_weights`.
        load_base: Where the base weights of a LoRA run lie now; None: where they were when it was trained.

    Raises:
        CheckpointError: Nothing there or damaged, or base weights that are gone or have changed.
    """
    source = find_weights(path)
    manifest = verify_checkpoint(source.path) if source.kind == "step" else None
    if manifest is not None and manifest.trainable_only:
        return Located(source.path.absolute(), find_base(source.path, manifest, load_base=load_base))
    if load_base is not None:
        log.warning("%s stands on no base weights: %s is not used", path, load_base)
    return Located(source.path.absolute())


def read_located(located: Located, *, ema: bool = False) -> LazyWeights:
    """Opens weights that have been located: whole, under SAT's keys without prefix.

    Args:
        located: From `locate_weights`.
        ema: The average of the weights, from a run of ours that keeps one.

    Raises:
        CheckpointError: Damaged, or not a transformer's.
    """
    own = read_own_weights(find_weights(located.path), ema=ema)
    return own if located.base is None else _read_base(located.base, frozenset()).overlaid(own)


def read_own_weights(source: WeightSource, *, ema: bool = False) -> LazyWeights:
    """Opens what a source itself holds: of a LoRA run its adapters alone.

    Raises:
        CheckpointError: As `read_located`.
    """
    if source.kind == "step":
        weights = read_step(source.path, read_manifest(source.path), ema=ema)
        if not any(key.startswith(("transformer.", "mixins.", "time_embed.")) for key in weights):
            raise _wrong_kind(weights, "a CogVideoX transformer that sat_train trained")
        return weights
    if ema:
        raise CheckpointError(f"{source.path} is not a run of sat_train, and an average was asked for")
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
        ema: The average of the weights, from a run of ours that keeps one.
        load_base: Where the base weights of a LoRA run lie now.

    Returns:
        Weights under SAT's keys without prefix. Those of a LoRA run are its base weights together with its
        adapters.

    Raises:
        CheckpointError: Nothing there, damaged, not a transformer's, or base weights that have changed since
            the run.
    """
    whole = read_located(locate_weights(path, load_base=load_base), ema=ema)
    return slice_weights(whole, rank=model_rank, size=model_size)


def find_base(folder: Path, manifest: Manifest, *, load_base: str | Path | None = None) -> BaseWeights:
    """Finds the weights that the adapters of a LoRA run stand on: by place, and then by hash.

    Args:
        folder: The step, for messages.
        manifest: Its manifest.
        load_base: Where they lie now; None: where the run recorded them. A run directory means that of its
            steps whose hash is the recorded one.

    Returns:
        Where they are, absolute, and their hash.

    Raises:
        CheckpointError: They are not there, or other weights are.
    """
    recorded = manifest.base_weights
    if recorded is None:
        raise CheckpointError(f"{folder} holds adapters only and does not say what they stand on")
    remedy = "args.load_base, or --load-base of sat-train convert, names where these weights lie now"
    problem = f"{folder} is a LoRA run that stands on {recorded.source} (sha256 {recorded.sha256[:12]})"
    place = recorded.source if load_base is None else load_base
    seen = []
    try:
        for candidate in _steps_of(place):
            sha256 = hash_weights(candidate)
            if sha256 == recorded.sha256:
                return _recorded(candidate, sha256)
            seen.append(f"{candidate} has sha256 {sha256[:12]}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{problem}\n  {error.problem}", expected="the same weights", remedy=remedy
        ) from error
    changed = "which has changed" if load_base is None else "and other weights were given"
    raise CheckpointError(
        f"{problem}, {changed}: {'; '.join(seen[:3])}",
        expected="the base weights that the run was trained on",
        remedy=remedy,
    )


def base_weights_at(path: str | Path) -> BaseWeights:
    """Returns what a LoRA run remembers of the weights it begins with: the absolute path and the hash.

    Raises:
        CheckpointError: Nothing there.
    """
    return _recorded(path, hash_weights(path))


def _recorded(path: str | Path, sha256: str) -> BaseWeights:
    """Shipped files keep their `asset:` name, which is the same on every machine."""
    return BaseWeights(source=str(shorten_assets(str(find_weights(path).path.absolute()))), sha256=sha256)


def _read_base(base: BaseWeights, above: frozenset[Path]) -> LazyWeights:
    """Opens base weights; older records name a LoRA run, which has a base of its own."""
    source = find_weights(base.source)
    if source.kind == "step" and (manifest := read_manifest(source.path)).trainable_only:
        if source.path in above:
            raise CheckpointError(
                f"{source.path} names itself as its base weights", remedy="use another step"
            )
        below = _read_base(find_base(source.path, manifest), above | {source.path})
        return below.overlaid(read_own_weights(source))
    return read_own_weights(source)


def _steps_of(place: str | Path) -> list[str]:
    """Returns the steps of a run directory, newest first, and any other place as it is."""
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
        CheckpointError: Nothing there, damaged, or not a VAE's.
    """
    source = find_weights(path, part="vae")
    if source.kind == "step":
        raise CheckpointError(
            f"{path} is a run of sat_train, which trains no VAE", expected="the weights of a VAE"
        )
    weights = read_weight_files(source.files[:1] if source.kind == "sat" else source.files)
    if any(key.startswith(_VAE_PREFIX) for key in weights):
        weights = weights.select(lambda key: _after(_VAE_PREFIX, key))
    weights = weights.select(lambda key: None if key.startswith("loss.") else key)
    if not any(key.startswith(("encoder.conv_in", "decoder.conv_in")) for key in weights):
        raise _wrong_kind(weights, "a video VAE: encoder.* and decoder.*")
    tensors = {key: weights[key].clone() for key in weights}
    return vae_state_from_diffusers(tensors) if is_diffusers_vae(tensors) else tensors


def check_state_dict(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str, may_lack: Collection[str] = ()
) -> None:
    """Compares what a model has with what a file holds, before anything trains.

    Args:
        expected: Names and shapes of the model.
        found: Names and shapes of the file.
        where: Names the file in the message.
        may_lack: Names that the file need not hold: tables the model computes, adapters that begin at zero.

    Raises:
        CheckpointError: Lists every missing name, every unexpected one, and every mismatch with both shapes.
    """
    needed = {name: shape for name, shape in expected.items() if name in found or name not in may_lack}
    check_names_and_shapes(needed, found, where=where)


@torch.no_grad()
def load_weights(module: torch.nn.Module, weights: LazyWeights, *, may_lack: Collection[str] = ()) -> None:
    """Copies weights into a module, one tensor at a time, after all names and shapes have been compared.

    Args:
        module: Holds parameters and buffers; they keep their device and dtype.
        weights: From `read_transformer_weights`, for this rank's slice.
        may_lack: As for `check_state_dict`.

    Raises:
        CheckpointError: As `check_state_dict`. Nothing has been copied then.
    """
    targets = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    found = {name: unflattened(shape, shapes.get(name)) for name, shape in weights.shapes.items()}
    check_state_dict(shapes, found, where=weights.where, may_lack=may_lack)
    for name in weights:
        targets[name].copy_(weights[name].reshape(shapes[name]))


def unflattened(found: Shape, expected: Shape | None) -> Shape:
    """Returns the shape that counts: a convolution's weight that is stored as a linear layer's is its own.

    CogVideo's released 1.0 weights hold the patch embedding as [d, c, 2, 2], its later code as [d, 4 c].
    """
    is_flat = expected is not None and len(expected) > 2 == len(found)
    if is_flat and expected and found == (expected[0], math.prod(expected[1:])):
        return expected
    return found


def _under_sat_keys(weights: LazyWeights) -> LazyWeights:
    if any(key.startswith(SAT_PREFIX) for key in weights):
        weights = weights.select(lambda key: _after(SAT_PREFIX, key))
    if any(key.startswith("transformer_blocks.") for key in weights):
        return _fused(weights)
    if not any(key.startswith("transformer.layers.") for key in weights):
        raise _wrong_kind(weights, "a CogVideoX transformer, in SAT's or diffusers' names")
    return weights.select(lambda key: None if key.endswith(_UNUSED) else key.replace(".original.", "."))


def _after(prefix: str, key: str) -> str | None:
    return key[len(prefix) :] if key.startswith(prefix) else None


def _fused(weights: LazyWeights) -> LazyWeights:
    """Turns diffusers' names and tensors into SAT's, each when it is read."""
    unknown = [key for key in weights if part_of_diffusers_key(key) is None]
    if unknown:
        transformer_from_diffusers({key: torch.empty(0) for key in unknown})  # raises, naming them
    sat_keys = {part.sat_key: None for key in weights if (part := part_of_diffusers_key(key))}
    return LazyWeights({key: _fuse(weights, key) for key in sat_keys}, where=weights.where)


def _fuse(weights: LazyWeights, sat_key: str) -> LazyTensor:
    parts = parts_of_sat_key(sat_key)
    missing = [part.diffusers_key for part in parts if part.diffusers_key not in weights.tensors]
    if missing:
        raise CheckpointError(
            f"{weights.where} lacks {', '.join(missing)}, which {sat_key} is made of",
            remedy="download the folder again, all shards of it",
        )
    lazy_tensors = [weights.tensors[part.diffusers_key] for part in parts]
    first = lazy_tensors[0].shape
    total = first[0] // len(parts[0].chunks) * parts[0].pieces
    return LazyTensor(
        (total, *first[1:]), lazy_tensors[0].dtype, partial(_read_fused, sat_key, parts, lazy_tensors)
    )


def _read_fused(
    sat_key: str, parts: Sequence[Part], lazy_tensors: Sequence[LazyTensor], shard: Shard | None
) -> Tensor:
    if shard is not None and len(parts) > 1:
        # each of diffusers' tensors is one of the parts that are sharded by themselves
        assert shard.parts == len(parts), (
            f"{sat_key} is sharded in {shard.parts} parts and made of {len(parts)}"
        )
        shard = Shard(shard.dim, 1, shard.rank, shard.size)
    tensors = {part.diffusers_key: lazy.read(shard) for part, lazy in zip(parts, lazy_tensors, strict=True)}
    return transformer_from_diffusers(tensors)[sat_key]


def _wrong_kind(weights: LazyWeights, expected: str) -> CheckpointError:
    for kind, signs in _KINDS:
        if any(sign in key for key in weights for sign in signs):
            remedy = "name it in args.load_lora (convert: --lora)" if "LoRA" in kind else "look at the path"
            return CheckpointError(f"{weights.where} holds {kind}", expected=expected, remedy=remedy)
    shown = ", ".join(list(weights)[:3])
    return CheckpointError(f"{weights.where} holds other weights: {shown}, ...", expected=expected)
