"""Recognises the format of a path to weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sat_train.checkpoint.history import follow_best
from sat_train.checkpoint.layout import LATEST, MANIFEST, committed_steps, parse_step, step_folder
from sat_train.config.paths import expand_assets
from sat_train.config.reading import RESOLVED
from sat_train.errors import CheckpointError
from sat_train.files import hash_file, read_text, reading
from sat_train.weights.readers import read_index

_SAT_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
_MOST_NAME_BYTES = 4096
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class WeightSource:
    """Location and format of weights.

    Args:
        kind: `files`: one file, or the shards of one set. `sat`: one file for each rank of the model axis, in
            rank order. `step`: a committed step of one of our runs.
        path: File or folder, for messages; for `step` the step folder.
        files: The files.
    """

    kind: Literal["files", "sat", "step"]
    path: Path
    files: tuple[Path, ...]


def find_weights(path: str | Path, *, part: str = "transformer") -> WeightSource:
    """Finds the weights at a path.

    Args:
        path: A file; a SAT folder or one of its steps; a run directory of ours, one of its steps or its
            `best`; a diffusers model folder, or the folder of one of its parts. `asset:` paths are shipped
            files.
        part: Folder to take from a diffusers model folder.

    Raises:
        CheckpointError: There are no weights, their format is unknown, or shards are missing.
    """
    with reading(str(path)[:200], error=CheckpointError, expected="weights", remedy="check the path"):
        where = follow_best(Path(expand_assets(str(path))).expanduser())
        if where.is_dir():
            return _find_in_folder(where, part)
        if not where.exists():
            raise CheckpointError(
                f"{path}: no such file or folder", expected="weights", remedy="check the path"
            )
        is_index = where.name.endswith(".index.json")
        return WeightSource("files", where, tuple(read_index(where)) if is_index else (where,))


def hash_weights(path: str | Path) -> str:
    """Returns one SHA-256 over the contents of all files of a source, or of the file if it is only one.

    Raises:
        CheckpointError: As `find_weights`.
    """
    source = find_weights(path)
    errors = reading(path, error=CheckpointError, expected="files that can be read")
    with errors, ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(hash_file, source.files))
    if len(digests) == 1:
        return digests[0]
    lines = [f"{file.name} {digest}" for file, digest in zip(source.files, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def _find_in_folder(where: Path, part: str) -> WeightSource:
    if (where / MANIFEST).is_file():
        return _step(where)
    steps = committed_steps(where)
    if steps:
        return _step(step_folder(where, steps[0]))
    _check_not_torn(where)
    if (where / LATEST).is_file():
        return _sat_folder(where)
    if _sat_files(where):
        return WeightSource("sat", where, _sat_files(where))
    if (where / part).is_dir():
        return WeightSource("files", where / part, _diffusers_files(where / part))
    if (where / "model_index.json").is_file():
        raise CheckpointError(
            f"{where} is a diffusers model without a {part}/ folder", remedy="download that folder too"
        )
    return WeightSource("files", where, _diffusers_files(where))


def _check_not_torn(where: Path) -> None:
    """Refuses a run or step of ours without a manifest, which would pass for SAT's, unverified."""
    is_step = parse_step(where.name) is not None
    if (where / RESOLVED).is_file() or (is_step and (where.parent / RESOLVED).is_file()):
        raise CheckpointError(
            f"{where} belongs to a run of sat_train and holds no complete checkpoint",
            expected=f"a step folder with its {MANIFEST}",
            remedy="use another step or another run",
        )


def _step(folder: Path) -> WeightSource:
    files = sorted(path for path in folder.iterdir() if path.suffix == ".pt")
    return WeightSource("step", folder, tuple(files))


def _sat_folder(where: Path) -> WeightSource:
    name = read_text(where / LATEST, limit=_MOST_NAME_BYTES).strip()
    folder = where / name
    if not name or not folder.is_dir() or folder.parent != where:
        raise CheckpointError(
            f"{where / LATEST} names '{name[:40]}', but there is no such folder",
            expected="the name of a step folder next to it",
            remedy="download that folder, or correct the file",
        )
    files = _sat_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no mp_rank_00_model_states.pt", expected="a SAT step folder")
    return WeightSource("sat", folder, files)


def _sat_files(folder: Path) -> tuple[Path, ...]:
    files = {int(match[1]): path for path in folder.iterdir() if (match := _SAT_FILE.fullmatch(path.name))}
    # only ranks below the number of files: a file of rank 9999999999 must not make that many missing
    missing = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(files)) if rank not in files]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}", remedy="copy the files of all ranks")
    return tuple(files[rank] for rank in sorted(files))


def _diffusers_files(folder: Path) -> tuple[Path, ...]:
    for pattern in _INDEXES:
        indexes = sorted(folder.glob(pattern))
        if indexes:
            return tuple(read_index(_plainest(indexes)))
    for suffix in _WEIGHT_SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if any(re.search(r"-\d{5}-of-\d{5}", file.name) for file in files):
            raise CheckpointError(f"{folder} holds shards without their index", expected=_INDEXES[0])
        if files:
            return (_only(folder, files),)
    raise CheckpointError(
        f"{folder} holds no weights in a known format",
        expected="a SAT folder (latest, <n>/mp_rank_00_model_states.pt), a diffusers folder, or a file",
        remedy="give the folder or the file that holds the weights",
    )


def _only(folder: Path, files: Sequence[Path]) -> Path:
    plain = _plainest(files)
    others = [file for file in files if file != plain and not file.name.startswith(plain.stem + ".")]
    if others:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{folder} holds several files of weights: {names}", remedy="name one of them")
    return plain


def _plainest(files: Sequence[Path]) -> Path:
    """Returns the name with the fewest suffixes: `model.safetensors`, not `model.fp16.safetensors`."""
    return min(files, key=lambda file: (file.name.count("."), file.name))
