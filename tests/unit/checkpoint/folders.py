"""Small checkpoints made of plain files, for the tests of publishing, finding and keeping."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

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


@contextmanager
def _interrupted(interrupt: Callable[[], None]) -> Iterator[None]:
    """Calls a function before each file operation and in the middle of each write, but its own."""
    is_interrupting = False

    def pause() -> None:
        nonlocal is_interrupting
        if not is_interrupting:
            is_interrupting = True
            interrupt()
            is_interrupting = False

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def late(*args: Any, **options: Any) -> Any:
            pause()
            return function(*args, **options)

        return late

    write = HashingFile.write

    def in_halves(self: HashingFile, data: Any) -> int:
        whole = memoryview(data).cast("B")
        half = write(self, whole[: whole.nbytes // 2])
        self._raw.flush()
        pause()
        return half + write(self, whole[half:])

    with ExitStack() as patches:
        for name in _POINTS:
            patches.enter_context(patch.object(os, name, before(getattr(os, name))))
        patches.enter_context(patch.object(HashingFile, "write", in_halves))
        yield


def run_killed(action: Callable[[], object], number: int) -> int:
    """Runs `action` in a forked process that dies at its `number`-th file operation; returns how it ended."""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def die() -> None:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        with _interrupted(die):
            action()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def states_of_kills(action: Callable[[], object], run: Path, root: Path) -> list[Path]:
    """Runs `action`; returns copies of a folder as a kill at each file operation leaves it, and as it ends.

    A kill leaves what the process has handed to the system, which is what a copy finds; a process forked for
    each operation would cost a hundred times as much.
    """
    copies: list[Path] = []

    def copy() -> None:
        target = root / f"killed{len(copies)}" / run.name
        shutil.copytree(run, target)
        copies.append(target)

    with _interrupted(copy):
        action()
    copy()
    return copies
