"""The manifest of a checkpoint: its files, their hashes, and the run that wrote them.

A manifest may come from a stranger, and a matching SHA-256 does not make its contents trustworthy: each field
is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sat_train.checkpoint.layout import MANIFEST, cannot_read, parse_step
from sat_train.errors import CheckpointError
from sat_train.files import FileRecord, NotRegular, hash_file, read_text
from sat_train.json_record import Count, JsonRecord, NonEmpty, RankCount, Sha256, read_record
from sat_train.weights.names import DTYPES

FORMAT = 2
_HASHING_THREADS = 8
_MOST_BYTES = 16 * 2**20  # files of some 50,000 ranks
_MOST_SHOWN = 1000  # characters of a message that quotes a stranger's file
# Files that readers would take for parts of the checkpoint.
_STATES = re.compile(r".*_states\.pt|fragments_rank_\d+\.pt")


class DamagedCheckpoint(CheckpointError):
    """The files differ from what was written. A file that cannot be read at the moment is not damaged."""


@dataclass(frozen=True)
class BaseWeights(JsonRecord):
    """The frozen base weights of a run.

    Args:
        source: Path or `asset:` name they were read from.
        sha256: `sat_train.interchange.locate.hash_weights` of that source.
    """

    source: NonEmpty
    sha256: Sha256


@dataclass(frozen=True)
class Manifest(JsonRecord):
    """Description of a checkpoint: everything known without opening its tensors.

    Args:
        step: Optimizer steps done.
        samples_consumed: Position in the data: samples that all ranks together have taken.
        samples_waiting: Samples that were skipped in the global order and are still to come.
        world_size: Number of processes that wrote it.
        data_size: Ranks on the data axis.
        model_size: Ranks on the model axis.
        dtype: Precision of the run: `fp32`, `bf16` or `fp16`.
        trainable_only: Whether the frozen weights of the base are left out.
        config_digest: `RunConfig.digest()`.
        data_fingerprint: Fingerprint of the data set.
        base_weights: The frozen weights, if `trainable_only`.
        versions: Version of each library that wrote it.
        files: All files of the folder except the manifest.
        format: Version of this record.
    """

    step: Count
    samples_consumed: Count
    world_size: RankCount
    data_size: RankCount
    model_size: RankCount
    dtype: str
    trainable_only: bool
    config_digest: str
    data_fingerprint: str
    base_weights: BaseWeights | None
    versions: dict[str, str]
    files: tuple[FileRecord, ...] = ()
    samples_waiting: tuple[Count, ...] = ()
    format: int = FORMAT

    def global_rank(self, data_rank: int, model_rank: int) -> int:
        """Returns the global rank at a position of the mesh that wrote the checkpoint."""
        return data_rank * self.model_size + model_rank

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
        DamagedCheckpoint: It is missing, or differs from what was written.
        CheckpointError: It cannot be read, or was not written by this version of sat_train.
    """
    path = folder / MANIFEST
    body = _parse(path, _read(folder, path))
    try:
        manifest = _decode(body)
        step = parse_step(folder.name)
        _check(step in (None, manifest.step), f"it is of step {manifest.step}, its folder of step {step}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not understood: {error}"[:_MOST_SHOWN],
            expected="a manifest that this version of sat_train wrote",
            remedy="use the version of sat_train that wrote it, or another step",
        ) from error
    return manifest


def _read(folder: Path, path: Path) -> str:
    try:
        return read_text(path, limit=_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpoint(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}",
            expected=f"a step folder that sat_train committed, which holds {MANIFEST}",
            remedy="use another step; a save into this folder never finished",
        ) from error
    except (NotRegular, UnicodeDecodeError) as error:
        raise _damaged_manifest(path, error) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
        if body.pop("sha256") != _body_digest(body):
            raise ValueError("its own SHA-256 does not match")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged_manifest(path, error) from error
    parsed: dict[str, Any] = body
    return parsed


def _damaged_manifest(path: Path, error: Exception) -> DamagedCheckpoint:
    reason = error.strerror if isinstance(error, OSError) else f"{error}"
    return DamagedCheckpoint(
        f"{path} is damaged: {reason}"[:_MOST_SHOWN],
        expected="the manifest as sat_train wrote it",
        remedy="use another step",
    )


def _decode(body: dict[str, Any]) -> Manifest:
    _check(body.get("format") == FORMAT, f"format {body.get('format')!r:.20} is not {FORMAT}")
    manifest: Manifest = read_record(Manifest, json.dumps(body))
    ranks = manifest.data_size * manifest.model_size
    _check(manifest.world_size == ranks, f"world_size = {manifest.world_size}, of {ranks} ranks")
    _check(manifest.dtype in DTYPES, f"dtype = {manifest.dtype!r:.40}")
    names = [record.name for record in manifest.files]
    for name in names:
        _check(is_plain_name(name), f"a file is called {name!r:.80}")
    _check(len(set(names)) == len(names), "a file is listed twice")
    return manifest


def is_plain_name(name: str) -> bool:
    """Returns whether a name is that of a file directly inside a folder, other than the manifest."""
    is_name = "\0" not in name and 0 < len(name) <= 255
    return is_name and name == Path(name).name and name not in (".", "..", MANIFEST)


def _check(is_right: bool, problem: str) -> None:
    if not is_right:
        raise ValueError(problem)


def verify_checkpoint(folder: Path) -> Manifest:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Everything that reads a checkpoint calls this first: resume, `args.load`, sampling, conversion.

    Returns:
        The manifest, if all files are as they were written.

    Raises:
        DamagedCheckpoint: A file is missing, of another size, or of other contents; all of them are named.
        CheckpointError: A file cannot be read, so the answer is unknown.
    """
    manifest = read_manifest(folder)
    _check_no_strays(folder, manifest)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        faults = [fault for fault in pool.map(lambda record: _fault(folder, record), manifest.files) if fault]
    damages = [fault for fault in faults if isinstance(fault, str)]
    if damages:
        raise DamagedCheckpoint(
            "\n  ".join([f"{folder} is damaged:", *damages]),
            expected="all files as they were when the checkpoint was written",
            remedy="use another step; this one cannot be repaired",
        )
    for error in faults:
        assert isinstance(error, OSError), "neither damaged nor unreadable"
        raise cannot_read(error.filename, error)
    return manifest


def _check_no_strays(folder: Path, manifest: Manifest) -> None:
    """Refuses files that readers would find by name although the manifest does not list them."""
    names = {record.name for record in manifest.files}
    try:
        strays = sorted(name for name in os.listdir(folder) if _STATES.fullmatch(name) and name not in names)
    except OSError as error:
        raise cannot_read(folder, error) from error
    if strays:
        raise CheckpointError(
            f"{folder / strays[0]} does not belong to the checkpoint",
            expected=f"the files that {MANIFEST} lists",
            remedy="move it out of the folder",
        )


def _fault(folder: Path, record: FileRecord) -> str | OSError | None:
    """Returns the fault of a file, or None: a text if it is damaged, an error if it cannot be read."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name}: {size} bytes, {record.size} were written"
        is_same = hash_file(path) == record.sha256
        return None if is_same else f"{record.name}: contents changed (SHA-256 differs)"
    except FileNotFoundError:
        return f"{record.name}: missing"
    except NotRegular:
        return f"{record.name}: not a regular file"
    except OSError as error:
        error.filename = error.filename or str(path)
        return error
