"""The manifest of a checkpoint: what belongs to it, what it must hash to, and what it was made from."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sat_train.checkpoint.layout import MANIFEST
from sat_train.errors import CheckpointError
from sat_train.files import FileRecord, hash_file

FORMAT = 1
_HASHING_THREADS = 8


@dataclass(frozen=True)
class BaseWeights:
    """The frozen weights that a LoRA run stands on.

    Args:
        source: Path or `asset:` name they were read from.
        sha256: `sat_train.checkpoint.weights.hash_weights` of that source.
    """

    source: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything known about a checkpoint without opening its tensors.

    Args:
        step: Optimizer steps done.
        samples_consumed: Position in the data: samples that all ranks together have taken.
        samples_waiting: Samples that were passed over in the global order and are still to come.
        world_size: Processes that wrote it.
        data_size: Ranks on the data axis; ZeRO's partitions depend on it.
        model_size: Ranks on the model axis.
        zero_stage: 0 to 3.
        trainable_only: Frozen weights are not inside (LoRA).
        config_digest: `RunConfig.digest()`.
        data_fingerprint: Fingerprint of the data set.
        base_weights: What the frozen weights were, when `trainable_only`.
        versions: Version of each library that wrote it.
        files: All files of the folder but the manifest.
        format: Version of this record.
    """

    step: int
    samples_consumed: int
    world_size: int
    data_size: int
    model_size: int
    zero_stage: int
    trainable_only: bool
    config_digest: str
    data_fingerprint: str
    base_weights: BaseWeights | None
    versions: dict[str, str]
    files: tuple[FileRecord, ...]
    samples_waiting: tuple[int, ...] = ()
    format: int = FORMAT

    def to_json(self) -> str:
        """Returns the text of `manifest.json`, which carries its own SHA-256."""
        body = asdict(self)
        return json.dumps({**body, "sha256": _body_digest(body)}, indent=1) + "\n"


def _body_digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a step folder.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        found = body.pop("sha256")
        if found != _body_digest(body):
            raise ValueError("its own SHA-256 does not match")
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']} is not {FORMAT}")
        body["files"] = tuple(FileRecord(**entry) for entry in body["files"])
        body["samples_waiting"] = tuple(body["samples_waiting"])
        body["base_weights"] = BaseWeights(**body["base_weights"]) if body["base_weights"] else None
        return Manifest(**body)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}",
            expected=f"a step folder that sat_train committed, which holds {MANIFEST}",
            remedy="use another step; a save into this folder never finished",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}",
            expected="the manifest as sat_train wrote it",
            remedy="use another step",
        ) from error


def verify_checkpoint(folder: Path) -> Manifest:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Returns:
        The manifest, when all files are as written.

    Raises:
        CheckpointError: A file is missing, of another size, or of other contents; all of them are named.
    """
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        faults = [fault for fault in pool.map(lambda record: _fault(folder, record), manifest.files) if fault]
    if faults:
        raise CheckpointError(
            "\n  ".join([f"{folder} is damaged:", *faults]),
            expected="all files as they were when the checkpoint was written",
            remedy="use another step; this one cannot be repaired",
        )
    return manifest


def _fault(folder: Path, record: FileRecord) -> str:
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name}: {size} bytes, {record.size} were written"
        return (
            "" if hash_file(path) == record.sha256 else f"{record.name}: contents changed (SHA-256 differs)"
        )
    except FileNotFoundError:
        return f"{record.name}: missing"
    except OSError as error:
        return f"{record.name}: cannot be read ({error.strerror})"
