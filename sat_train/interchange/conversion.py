"""Exports weights to a folder that diffusers or SAT loads, after comparing it with its source.

Everything is written into a temporary folder next to the destination, loaded back, compared value for value,
and renamed. A failure at any point leaves nothing behind.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch

from sat_train.checkpoint.consolidate import trained_dtype
from sat_train.checkpoint.layout import LATEST, SAT_PREFIX
from sat_train.checkpoint.manifest import Manifest, read_manifest, verify_checkpoint
from sat_train.config import ModelSpec
from sat_train.config.parts.adapter_parts import ALPHA_KEY, RANK_KEY
from sat_train.errors import CheckpointError
from sat_train.files import HashingFile, reading, sync_folder, write_file, write_text
from sat_train.interchange.adapter_export import updates_to_peft
from sat_train.interchange.adapters import (
    check_merged,
    is_adapter_key,
    merge_updates,
    read_given_loras,
    read_lora,
    without_adapters,
)
from sat_train.interchange.controlnet_folder import is_controlnet, write_as_modules, write_controlnet
from sat_train.interchange.diffusers_folder import check_model, write_pipeline
from sat_train.interchange.locate import read_own_weights, read_transformer_weights
from sat_train.interchange.module_files import write_module_file
from sat_train.interchange.sources import WeightSource, find_weights, hash_weights
from sat_train.models.low_rank import Updates, is_dora, stacked, strengthened, truncated
from sat_train.weights.lazy import LazyWeights, check_same, from_tensors
from sat_train.weights.names import module_of, modules_in
from sat_train.weights.readers import read_weight_files
from sat_train.weights.safetensors_out import Progress, unseen, write_safetensors
from sat_train.weights.tensor_parallel import slice_weights

LORA_FILE_STEM = "pytorch_lora_weights"
_SAT_STEP = "1"
_SAT_MATRIX = re.compile(r"\.matrix_[AB]\.\d+$")


@dataclass(frozen=True)
class Conversion:
    """Settings of one conversion.

    Args:
        source: A run or step of ours, a SAT folder, a diffusers folder, or a file.
        dest: Folder to create; it must not exist, or must be empty.
        to: Target format; `modules` writes the network modules of a run into a file of their own,
            `controlnet` a control branch for TheDenk/cogvideox-controlnet.
        merge_lora: Add the adapters to the weights instead of writing them separately.
        strength: Factor on the adapters of the source.
        lora: Other adapters. They are added to the adapters of the source, or to its weights if it has none.
        lora_strength: Factor on each of `lora`, or one for all.
        lora_rank: Rank to truncate adapters to that are written separately; None keeps them exact.
        load_base: Present place of a LoRA run's base weights; None: the recorded one.
        ema: Export the average of the weights instead of the weights.
        model_size: Ranks on the model axis (`sat` only).
        dtype: Dtype of the written weights; None: the precision of the run, or that of the source.
        model: Its numbers, for diffusers' configuration files and modules; None if only SAT's format or
            adapters are written.
        extensions: Record of the extensions it was trained with, for modules.
        modules: Modules to write (`modules`, `controlnet`); none: everything that the run trained or added.
        without_modules: Leave out modules that diffusers does not have.
    """

    source: Path
    dest: Path
    to: Literal["diffusers", "sat", "modules", "controlnet"]
    merge_lora: bool = False
    strength: float = 1.0
    lora: tuple[Path, ...] = ()
    lora_strength: tuple[float, ...] = (1.0,)
    lora_rank: int | None = None
    load_base: Path | None = None
    ema: bool = False
    model_size: int = 1
    dtype: torch.dtype | None = None
    model: ModelSpec | None = None
    extensions: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    without_modules: bool = False


@dataclass(frozen=True)
class ConversionSource:
    """The opened source of a conversion.

    Args:
        weights: Weights under SAT's keys, in the dtype to write; empty if adapters are written separately.
        updates: Adapters to write separately, or those that were added to `base`.
        base: The weights that adapters were added to; None if nothing was added.
        below: The weights under adapters that are written separately, where these need them: under DoRA's.
        metadata: The origin of the weights, as texts.
    """

    weights: LazyWeights
    updates: Updates
    base: LazyWeights | None
    metadata: dict[str, str]
    below: LazyWeights | None = None


def no_progress(size: int) -> Progress:
    """Reports no progress."""
    return unseen


def convert(conversion: Conversion, *, progress: Callable[[int], Progress] = no_progress) -> Path:
    """Converts weights.

    Args:
        conversion: The settings.
        progress: Takes the total number of bytes, and returns a function to call with the bytes written.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: The source is not usable, the destination is taken, or the written weights do not
            read back the same.
    """
    _check_dest(conversion.dest)
    if conversion.to == "diffusers" and conversion.model_size != 1:
        raise CheckpointError("--model-parallel-size applies to SAT's format only", remedy="use --to sat")
    _check_strengths(conversion)
    source = None if conversion.to in ("modules", "controlnet") else open_source(conversion)
    temporary = conversion.dest.parent / f".tmp-convert-{uuid.uuid4().hex[:8]}"
    try:
        conversion.dest.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        if source is None:
            _write_modules(conversion, temporary, progress)
        else:
            _check_space(temporary, source.weights)
            _write(conversion, source, temporary, progress)
        if conversion.dest.exists():
            conversion.dest.rmdir()
        os.rename(temporary, conversion.dest)
        sync_folder(conversion.dest.parent)
    except OSError as error:
        raise CheckpointError(f"{conversion.dest} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return conversion.dest


def _write_modules(conversion: Conversion, folder: Path, progress: Callable[[int], Progress]) -> None:
    source, model = find_weights(conversion.source), conversion.model
    names, dtype, ema = conversion.modules, conversion.dtype, conversion.ema
    if conversion.to == "modules" and is_controlnet(source.path):
        origin = _metadata(source, None, conversion)
        write_as_modules(source.path, folder, names=names, dtype=dtype, metadata=origin)
        return
    if model is None or source.kind != "step":
        raise CheckpointError(
            f"{conversion.source} is not a run of sat_train", expected="a run, or one of its steps"
        )
    origin = _metadata(source, verify_checkpoint(source.path), conversion)
    if conversion.to == "controlnet":
        write_controlnet(
            source, folder, model, names=names, dtype=dtype, ema=ema, metadata=origin, progress=progress
        )
        return
    extensions = conversion.extensions
    path = write_module_file(
        source, folder, model, extensions=extensions, names=names, dtype=dtype, ema=ema, metadata=origin
    )
    progress(path.stat().st_size)(path.stat().st_size)


def open_source(conversion: Conversion) -> ConversionSource:
    """Opens and verifies the source of a conversion.

    Raises:
        CheckpointError: It is damaged, not a transformer, or has no adapters to merge.
    """
    source = find_weights(conversion.source)
    manifest = read_manifest(source.path) if source.kind == "step" else None
    updates = strengthened(read_lora(conversion.source, ema=conversion.ema), conversion.strength)
    is_merging = conversion.merge_lora or (
        bool(conversion.lora) and not (updates and conversion.to == "diffusers")
    )
    _check_adapter_words(conversion, has_adapters=bool(updates), is_merging=is_merging)
    if conversion.to == "diffusers":
        _check_diffusers_holds(conversion, source)
    metadata = _metadata(source, manifest, conversion)  # hashes the source, after its headers were checked
    if updates and not is_merging and conversion.to == "diffusers":
        return _adapters_apart(conversion, updates, metadata, where=str(source.path))
    dtype = conversion.dtype or (trained_dtype(manifest) if manifest else None)
    whole = read_transformer_weights(conversion.source, ema=conversion.ema, load_base=conversion.load_base)
    if conversion.without_modules:
        whole = whole.select(lambda key: key if module_of(key) is None else None)
    if not is_merging:
        adapters = whole.select(lambda key: key if is_adapter_key(key) else None)
        _check_sat_reads(adapters)
        return ConversionSource(without_adapters(whole).cast(dtype).overlaid(adapters), {}, None, metadata)
    updates = stacked(updates, read_given_loras(conversion.lora, conversion.lora_strength))
    if not updates:
        raise CheckpointError(
            f"{whole.where} holds no LoRA adapters to merge", remedy="leave out --merge-lora"
        )
    base = without_adapters(whole)
    return ConversionSource(merge_updates(base, updates, dtype=dtype).cast(dtype), updates, base, metadata)


def _check_diffusers_holds(conversion: Conversion, source: WeightSource) -> None:
    """Raises for network modules, which diffusers does not have, unless they are to be left out."""
    if source.kind == "step":
        modules = modules_in(read_own_weights(source))
    else:  # a file may hold adapters alone
        files = source.files[:1] if source.kind == "sat" else source.files
        modules = modules_in(key.removeprefix(SAT_PREFIX) for key in read_weight_files(files))
    if modules and not conversion.without_modules:
        raise CheckpointError(
            f"{conversion.source} has the modules {', '.join(modules)}, which diffusers does not know",
            expected="weights of a CogVideoX transformer and adapters alone",
            remedy="--to modules writes them into a file of their own; --without-modules exports the rest",
        )


def _check_sat_reads(adapters: LazyWeights) -> None:
    """Raises for adapters that SAT's `lora2` does not compute: other tensors, or scales of single layers."""
    foreign = [key for key in adapters if not (key in (RANK_KEY, ALPHA_KEY) or _SAT_MATRIX.search(key))]
    if foreign:
        raise CheckpointError(
            f"{adapters.where} holds {foreign[0]}, which SAT does not know",
            expected="plain LoRA with one scale",
            remedy="use --merge-lora, or --to diffusers",
        )


def _adapters_apart(
    conversion: Conversion, updates: Updates, metadata: dict[str, str], *, where: str
) -> ConversionSource:
    """Returns the adapters of the source and the others as one set; of DoRA's, the base too."""
    updates = stacked(updates, read_given_loras(conversion.lora, conversion.lora_strength))
    if conversion.lora_rank is not None:
        updates = truncated(updates, conversion.lora_rank)
    below = None
    if is_dora(updates):
        below = without_adapters(read_transformer_weights(conversion.source, load_base=conversion.load_base))
    return ConversionSource(LazyWeights({}, where=where), updates, None, metadata, below)


def _write(
    conversion: Conversion, source: ConversionSource, folder: Path, progress: Callable[[int], Progress]
) -> None:
    if source.updates and source.base is None:
        _write_adapters(folder, source, conversion.dtype, progress)
        return
    model = conversion.model
    if model is not None and conversion.without_modules:
        model = replace(model, modules={}, hook_order={})
    if model is not None:
        check_model(without_adapters(source.weights), model, source=conversion.source)
    if conversion.to == "sat":
        _write_sat(folder, source, conversion.model_size, progress)
    elif model is None:
        raise CheckpointError(
            f"{conversion.source} does not name its model",
            expected="the model's numbers, for diffusers' config.json",
            remedy="name its preset, e.g. --base configs/model/cogvideox_5b.yaml",
        )
    else:
        write_pipeline(folder, source.weights, model, metadata=source.metadata, progress=progress)
    if source.base is not None:
        weights_folder = folder / "transformer" if conversion.to == "diffusers" else folder
        check_merged(read_transformer_weights(weights_folder), source.base, source.updates)


def _write_sat(
    folder: Path, source: ConversionSource, model_size: int, progress: Callable[[int], Progress]
) -> None:
    (folder / _SAT_STEP).mkdir()
    slices = [slice_weights(source.weights, rank=rank, size=model_size) for rank in range(model_size)]
    report = progress(sum(weights.num_bytes for weights in slices))
    for rank, weights in enumerate(slices):
        path = folder / _SAT_STEP / f"mp_rank_{rank:02d}_model_states.pt"
        _write_sat_file(path, weights, source.metadata)
        report(weights.num_bytes)
    write_text(folder / LATEST, _SAT_STEP)
    for rank, ours in enumerate(slices):
        check_same(ours, read_transformer_weights(folder, model_rank=rank, model_size=model_size))


def _write_sat_file(path: Path, weights: LazyWeights, metadata: Mapping[str, str]) -> None:
    module = {SAT_PREFIX + key: _compact(weights[key]) for key in weights}
    state = {
        "module": module,
        "iteration": int(metadata.get("sat_train.step", "0")),
        "sat_train": dict(metadata),
    }

    def write(file: HashingFile) -> None:
        torch.save(state, cast(IO[bytes], file))

    write_file(path, write)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a view, of which `torch.save` would write the whole storage."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _write_adapters(
    folder: Path, source: ConversionSource, dtype: torch.dtype | None, progress: Callable[[int], Progress]
) -> None:
    tensors, header = updates_to_peft(source.updates, source.below)
    lazy = from_tensors(tensors, where=source.weights.where).cast(dtype)
    metadata = {**source.metadata, **header}
    write_safetensors(folder, LORA_FILE_STEM, lazy, metadata=metadata, progress=progress(lazy.num_bytes))
    check_same(lazy, read_weight_files([folder / f"{LORA_FILE_STEM}.safetensors"]))


def _metadata(source: WeightSource, manifest: Manifest | None, conversion: Conversion) -> dict[str, str]:
    if manifest is None:
        return {
            "sat_train.source": str(source.path),
            "sat_train.source_sha256": hash_weights(conversion.source),
        }
    origin: dict[str, Any] = {
        "run": source.path.parent.name,
        "step": manifest.step,
        "samples_consumed": manifest.samples_consumed,
        "config_sha256": manifest.config_digest,
        "data_fingerprint": manifest.data_fingerprint,
        "weights": "average" if conversion.ema else "trained",
    }
    if conversion.lora:
        origin["lora"] = ", ".join(map(str, conversion.lora))
        origin["lora_strength"] = ", ".join(f"{strength:g}" for strength in conversion.lora_strength)
    if manifest.base_weights is not None:
        origin |= {"base": manifest.base_weights.source, "base_sha256": manifest.base_weights.sha256}
    return {f"sat_train.{name}": str(value) for name, value in origin.items()}


def _check_strengths(conversion: Conversion) -> None:
    if not conversion.lora and conversion.lora_strength != (1.0,):
        raise CheckpointError(
            "--lora-strength is given without --lora", remedy="name the LoRA file with --lora"
        )
    if len(conversion.lora_strength) not in (1, len(conversion.lora)):
        raise CheckpointError(
            f"--lora-strength has {len(conversion.lora_strength)} numbers for {len(conversion.lora)} files",
            expected="one number, or one for each file of --lora",
        )


def _check_adapter_words(conversion: Conversion, *, has_adapters: bool, is_merging: bool) -> None:
    if conversion.strength != 1.0 and not has_adapters:
        raise CheckpointError(
            f"{conversion.source} has no adapters for --strength", remedy="leave --strength out"
        )
    if conversion.lora_rank is not None and (is_merging or not has_adapters or conversion.to == "sat"):
        raise CheckpointError(
            "--lora-rank applies to adapters that are written as a file of their own",
            expected="a source with adapters, --to diffusers, and no --merge-lora",
        )


def _check_dest(dest: Path) -> None:
    with reading(str(dest)[:200], error=CheckpointError, expected="a folder to make"):
        _check_free(dest)


def _check_free(dest: Path) -> None:
    if dest.is_dir() and not any(dest.iterdir()):
        return
    if dest.exists():
        raise CheckpointError(
            f"{dest} exists already", expected="a new or empty folder", remedy="choose another name"
        )


def _check_space(folder: Path, weights: LazyWeights) -> None:
    free = shutil.disk_usage(folder).free
    if free < weights.num_bytes:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free",
            expected=f"{weights.num_bytes / 1e9:.1f} GB for the weights",
        )
