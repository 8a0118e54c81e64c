"""Small checkpoints made of plain files, for the tests of publishing, finding and keeping."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sat_train import files as files_module
from sat_train.checkpoint import publish
from sat_train.checkpoint.manifest import Manifest
from sat_train.checkpoint.publish import RankReport
from sat_train.distributed.processes import ProcessMesh
from sat_train.files import HashingFile, write_file

FILES = ("mp_rank_00_model_states.pt", "fragments_rank_00.pt")


def run_directory(root: Path, stamp: str = "20260101-000000", name: str = "exp") -> Path:
    folder = root / f"{name}-{stamp}"
    folder.mkdir(parents=True)
    return folder


def describe(step: int) -> Manifest:
    return Manifest(
        step=step,
        samples_consumed=4 * step,
        world_size=1,
        data_size=1,
        model_size=1,
        dtype="bf16",
        trainable_only=False,
        config_digest="c" * 64,
        data_fingerprint="d" * 64,
        base_weights=None,
        versions={"torch": torch.__version__},
    )


def write_shards(folder: Path, step: int) -> RankReport:
    """Two files that hold the step, large enough to be written in several pieces."""
    records = []
    for name in FILES:

        def write(file: HashingFile) -> None:
            torch.save({"step": step, "weights": torch.full((5000,), float(step))}, file)

        try:
            records.append(write_file(folder / name, write))
        except OSError as error:
            return RankReport(files=records, failure=f"{name}: {error.strerror}")
    return RankReport(files=records)


def commit(mesh: ProcessMesh, run: Path, step: int, *, expected_bytes: int = 0) -> Path:
    temporary = publish.open_temporary(mesh, run, step=step, expected_bytes=expected_bytes)
    report = write_shards(temporary, step)
    files = partial(publish.publish_files, temporary, run, describe(step), lambda: None)
    return publish.commit(mesh, files, report)


def unsigned(manifest: Path) -> dict[str, Any]:
    """Returns the contents of a manifest without its own hash."""
    return {key: value for key, value in json.loads(manifest.read_text()).items() if key != "sha256"}


def signed(body: dict[str, Any]) -> str:
    """Returns a manifest as anybody can write one: its own hash is right, its contents may be anything."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "sha256": hashlib.sha256(canonical.encode()).hexdigest()})


def holds_step(folder: Path, step: int) -> bool:
    """Says whether every file of a step folder loads and holds what was written for that step."""
    states = [torch.load(folder / name, weights_only=True) for name in FILES]
    return all(
        state["step"] == step and torch.equal(state["weights"], torch.full((5000,), float(step)))
        for state in states
    )


_POINTS = ("fsync", "replace", "rename", "mkdir", "open", "rmdir", "unlink")


def _die_at(number: int) -> None:
    """From now on this process dies at its `number`-th file operation; a write stops half-way."""
    count = 0

    def dies() -> bool:
        nonlocal count
        count += 1
        return count == number

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **options: Any) -> Any:
            if dies():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return killed

    for name in _POINTS:
        setattr(os, name, before(getattr(os, name)))
    write = files_module.HashingFile.write

    def half_written(self: files_module.HashingFile, data: Any) -> int:
        if dies():
            write(self, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            self._raw.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    files_module.HashingFile.write = half_written  # type: ignore[method-assign]


def run_killed(action: Callable[[], object], number: int) -> int:
    """Runs `action` in a forked process that dies at its `number`-th file operation; returns how it ended."""
    child = os.fork()
    if child == 0:
        _die_at(number)
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1]
