"""Weights of network modules in a file of their own: what a run has trained next to its frozen base.

A file `modules.safetensors` holds `mixins.NAME.*` of each module, and those weights of the base that the run
trained, such as a widened patch embedding. Its header says what they belong to: part and settings of each
module, the extensions with the hashes of their files, and the hash of the base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sat_train.checkpoint.consolidate import trained_dtype
from sat_train.checkpoint.manifest import BaseWeights, read_manifest
from sat_train.config import ModelSpec, RunConfig
from sat_train.errors import CheckpointError, ConfigError, Fault
from sat_train.files import reading
from sat_train.interchange.adapters import without_adapters
from sat_train.interchange.locate import read_own_weights
from sat_train.interchange.sources import WeightSource, hash_weights
from sat_train.json_record import JsonRecord, NonEmpty, read_record
from sat_train.log import get_logger
from sat_train.weights.lazy import LazyWeights, check_same
from sat_train.weights.names import module_of, modules_in
from sat_train.weights.readers import read_metadata, read_weight_files
from sat_train.weights.safetensors_out import unseen, write_safetensors

log = get_logger(__name__)

STEM = "modules"
HEADER = "sat_train.modules"  # key of the header's metadata
FORMAT = 1


@dataclass(frozen=True)
class ModuleRecord(JsonRecord):
    """A network module of a file.

    Args:
        name: Its name in the model.
        target: The part.
        params: Its settings.
    """

    name: NonEmpty
    target: NonEmpty
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleFile(JsonRecord):
    """The manifest of a file of modules, in the header of the file.

    Args:
        modules: The modules whose weights it holds.
        extensions: Name, version and file hashes of the extensions of the run.
        keys: Names of its weights.
        base_weights: The weights they were trained next to; None where the run trained all of them.
        format: Version of this record.
    """

    modules: tuple[ModuleRecord, ...]
    extensions: dict[str, Any]
    keys: tuple[str, ...]
    base_weights: BaseWeights | None = None
    format: int = FORMAT


def write_module_file(
    source: WeightSource,
    folder: Path,
    model: ModelSpec,
    *,
    extensions: Mapping[str, Any],
    names: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    ema: bool = False,
    metadata: Mapping[str, str],
) -> Path:
    """Writes the modules of a run of ours into a file of their own, and reads it back.

    Args:
        source: A verified step of the run.
        folder: Existing folder for the file.
        model: The run's model.
        extensions: Record of the extensions that it was trained with.
        names: Modules to write, without weights of the base; none: everything that the run trained or added.
        dtype: Dtype of the written weights; None: the precision that the run computed in.
        ema: Write the average of the weights.
        metadata: The origin, for the header.

    Raises:
        CheckpointError: The run has no such modules, or trained its base as well.
    """
    manifest = read_manifest(source.path)
    own = without_adapters(read_own_weights(source, ema=ema))
    chosen = _chosen(own, source.path, names, is_whole=not manifest.trainable_only)
    chosen = chosen.cast(dtype or trained_dtype(manifest))
    record = ModuleFile(
        modules=tuple(_describe(name, model) for name in modules_in(chosen)),
        extensions=dict(extensions),
        keys=tuple(chosen),
        base_weights=manifest.base_weights,
    )
    return save_modules(folder, chosen, record, metadata=metadata)


def save_modules(
    folder: Path, weights: LazyWeights, record: ModuleFile, *, metadata: Mapping[str, str]
) -> Path:
    """Writes a file of modules with its manifest, and reads it back.

    Args:
        folder: Existing folder for the file.
        weights: The weights, under SAT's keys.
        record: Its manifest.
        metadata: The origin, for the header.

    Returns:
        The file.
    """
    header = {**metadata, HEADER: json.dumps(asdict(record))}
    write_safetensors(folder, STEM, weights, metadata=header, progress=unseen, max_shard_bytes=2**62)
    path = folder / f"{STEM}.safetensors"
    check_same(weights, read_weight_files([path]))
    return path


def _chosen(own: LazyWeights, source: Path, names: Sequence[str], *, is_whole: bool) -> LazyWeights:
    present = modules_in(own)
    if missing := sorted(set(names) - set(present)):
        raise CheckpointError(
            f"{source} has no module {', '.join(missing)}", expected=f"one of {', '.join(present) or 'none'}"
        )
    if not present:
        raise CheckpointError(f"{source} has no modules of its own", remedy="use --to sat or --to diffusers")
    if is_whole and not names:
        raise CheckpointError(
            f"{source} trained its base next to the modules {', '.join(present)}",
            expected="a run with a frozen base: model.not_trainable_prefixes: [all]",
            remedy="use --to sat for all weights, or --module NAME for a module without them",
        )
    if names:
        return own.select(lambda key: key if module_of(key) in names else None)
    return own.select(lambda key: key if _is_weight(key) else None)


def _is_weight(key: str) -> bool:
    """Returns whether a key is a weight: positions are tables that the model computes."""
    return not key.startswith("mixins.pos_embed.")


def _describe(name: str, model: ModelSpec) -> ModuleRecord:
    module = model.modules.get(name)
    if module is None:
        raise CheckpointError(
            f"the weights have a module {name}, which the configuration does not",
            expected=f"model.modules.{name}, as in the run's resolved.yaml",
        )
    return ModuleRecord(name, module.target, module.params.model_dump(mode="json"))


def check_module_files(paths: Sequence[str | Path], config: RunConfig, base: Path) -> None:
    """Checks that a model has the modules of some files, with the settings and extensions of their training.

    Another base than that of their training is only logged.

    Args:
        paths: Files, or folders with a `modules.safetensors`.
        config: Configuration of the model.
        base: The weights that they are laid over.

    Raises:
        CheckpointError: A file is not one of ours.
        ConfigError: The model has no such module, or an extension is missing or has changed.

    Ranks: one.
    """
    records = {path: read_module_file(path)[1] for path in map(_file, paths)}
    faults = [fault for path, record in records.items() for fault in _misfits(path, record, config)]
    if faults:
        raise ConfigError(faults)
    trained_on = {path: each.base_weights for path, each in records.items() if each.base_weights is not None}
    sha256 = hash_weights(base) if trained_on else ""
    for path, trained_base in trained_on.items():
        if trained_base.sha256 != sha256:
            log.warning("%s was trained next to %s, and %s differs from it", path, trained_base.source, base)


def read_module_files(paths: Sequence[str | Path]) -> LazyWeights:
    """Reads files of modules: weights to lay over those of the base.

    Raises:
        CheckpointError: A file is not one of ours, or two hold one weight.
    """
    total = LazyWeights({}, where="")
    for path in paths:
        weights = read_module_file(_file(path))[0]
        if both := sorted(total.keys() & weights.keys()):
            raise CheckpointError(f"{path} holds {both[0]}, and so does {total.where}")
        total = total.overlaid(weights) if total else weights
    return total


def _file(path: str | Path) -> Path:
    given = Path(path).expanduser()
    if not given.is_dir():
        return given
    if not (file := given / f"{STEM}.safetensors").is_file():
        raise CheckpointError(
            f"{path} holds no {file.name}",
            expected="a folder that `sat-train convert --to modules` wrote",
            remedy=f"sat-train convert {path} DEST --to modules, of a run or of a control branch",
        )
    return file


def read_module_file(path: Path) -> tuple[LazyWeights, ModuleFile]:
    """Returns the weights of a file of modules, and its manifest.

    Raises:
        CheckpointError: It is not such a file, or its weights are not those of its manifest.
    """
    weights, text = read_weight_files([path]), read_metadata(path).get(HEADER)
    if text is None:
        raise CheckpointError(
            f"{path} does not say which modules it holds",
            expected="a file that `sat-train convert --to modules` wrote",
        )
    with reading(path, error=CheckpointError, expected="the manifest of a file of modules"):
        record = read_record(ModuleFile, text)
    if set(record.keys) != weights.keys():
        odd = min(set(record.keys) ^ weights.keys())
        raise CheckpointError(f"{path}: {odd} is not in both the file and its manifest")
    return weights, record


def _misfits(path: Path, record: ModuleFile, config: RunConfig) -> Iterator[Fault]:
    yield from config.extensions.faults(record.extensions, str(path))
    for module in record.modules:
        own, key = config.spec.modules.get(module.name), f"model.modules.{module.name}"
        if own is None or own.target != module.target:
            given = "" if own is None else own.target
            yield Fault(f"{key}.target", given, f"{module.target}, as it was trained", str(path))
            continue
        params = own.params.model_dump(mode="json")
        for name, value in module.params.items():
            if params.get(name) != value:
                yield Fault(
                    f"{key}.params.{name}", str(params.get(name)), f"{value}, as it was trained", str(path)
                )
