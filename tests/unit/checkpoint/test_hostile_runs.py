"""A run directory that a stranger made is one clear error, soon; never a traceback or a file outside it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_train.checkpoint.find import find_resume_point
from sat_train.checkpoint.history import read_latest
from sat_train.checkpoint.layout import MANIFEST
from sat_train.checkpoint.manifest import read_manifest, verify_checkpoint
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError, SatTrainError
from sat_train.interchange.locate import read_transformer_weights
from sat_train.interchange.sources import find_weights
from tests.unit.checkpoint.folders import FILES, commit, run_directory, signed, unsigned

NAMES: list[Any] = [
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "a/b", "a\0b", "x" * 300, MANIFEST),
    *(None, 7, [], {}, True),
]
SIZES: list[Any] = [-1, 2**70, 1.5, "1", None, True, 10**400]
HASHES: list[Any] = ["", "z" * 64, "A" * 64, None, 5, "0" * 63]
FIELDS: dict[str, list[Any]] = {
    "step": [-1, 2**70, "7", None, 8, 7.0, True],
    "samples_consumed": [-1, 2**70, None, []],
    "world_size": [0, -1, 10**12, "1"],
    "data_size": [0, 2, 10**12, None],
    "model_size": [0, 2, 10**12],
    "dtype": [16, "int8", None, [], "torch.float32"],
    "trainable_only": [0, None, "no"],
    "base_weights": [[], "x", {}, {"source": "", "sha256": "0" * 64}, {"source": "x"}],
    "versions": [[], None, {"torch": 1}],
    "files": [None, {}, [[]], [None], ["x"], 3],
    "samples_waiting": [None, {}, [-1], ["1"], [2**70]],
    "format": [1, 3, None, "1", []],
}
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "no UTF-8": b"\xff\xfe{",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "a text": b'"x"',
    "digits": b"1" * 5000,
    "null": b"null",
    "surrogate": b'{"sha256": "\\ud800"}',
    "large": b" " * (17 * 2**20),
}


def changed_manifests() -> list[tuple[str, Any]]:
    """Returns (field, value) of manifests that are right but for one thing, and hold the right hash of it."""
    values = [(name, value) for name, values in FIELDS.items() for value in values]
    records = (("name", NAMES), ("size", SIZES), ("sha256", HASHES))
    return values + [(f"files.{field}", value) for field, odd in records for value in odd]


def refused(step: Path) -> None:
    """Every entrance refuses the folder, in a message that names something inside it."""
    entrances: list[Callable[[], object]] = [
        lambda: verify_checkpoint(step),
        lambda: find_resume_point(
            str(step), save_root=step.parent.parent, experiment_name="exp", is_alive=lambda _: False
        ),
        lambda: read_transformer_weights(step),
    ]
    for entrance in entrances:
        with pytest.raises(CheckpointError) as caught:
            entrance()
        assert str(step) in str(caught.value)
        assert len(str(caught.value)) < 3000


def test_a_manifest_that_is_wrong_in_one_field_is_refused(mesh: ProcessMesh, tmp_path: Path) -> None:
    sys.set_int_max_str_digits(4300)
    step = commit(mesh, run_directory(tmp_path), 7)
    body = unsigned(step / MANIFEST)
    cases = changed_manifests()
    assert len(cases) >= 60
    for field, value in cases:
        other = json.loads(json.dumps(body))
        if field.startswith("files."):
            other["files"][0][field.removeprefix("files.")] = value
        else:
            other[field] = value
        (step / MANIFEST).write_text(signed(other))
        refused(step)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_manifest_that_is_no_manifest_is_refused(mesh: ProcessMesh, tmp_path: Path, kind: str) -> None:
    step = commit(mesh, run_directory(tmp_path), 7)
    (step / MANIFEST).write_bytes(TEXTS[kind])
    refused(step)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_file_that_is_no_file_is_refused_at_once(
    mesh: ProcessMesh, tmp_path: Path, name: str, kind: str
) -> None:
    step = commit(mesh, run_directory(tmp_path), 7)
    (step / name).unlink()
    if kind == "fifo":
        os.mkfifo(step / name)
    elif kind == "device":
        (step / name).symlink_to("/dev/zero")
    else:
        (step / name).mkdir()
    refused(step)


@pytest.mark.parametrize("seed", range(20))
def test_a_manifest_of_random_damage_is_refused_or_read(mesh: ProcessMesh, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    step = commit(mesh, run_directory(tmp_path), 7)
    original = (step / MANIFEST).read_bytes()
    for _ in range(10):
        data = bytearray(original)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (step / MANIFEST).write_bytes(bytes(data))
        try:
            read_manifest(step)
        except CheckpointError:
            continue


@pytest.mark.parametrize("name", ["²", "007", "1" * 200, "-1", "1e3", " 7"])
def test_a_folder_whose_name_is_nearly_a_number_is_no_step(
    mesh: ProcessMesh, tmp_path: Path, name: str
) -> None:
    run = run_directory(tmp_path)
    commit(mesh, run, 7)
    (run / "7").rename(run / name)
    assert (
        find_resume_point("auto", save_root=tmp_path, experiment_name="exp", is_alive=lambda _: False) is None
    )


@pytest.mark.parametrize(
    "text", ["../x", "/etc", "..", ".", "", "\x1b]0;x\x07", "x" * 5000, "7\0", "\udcff", "7/../7"]
)
def test_a_latest_that_leads_elsewhere_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "7").mkdir()
    assert read_latest(tmp_path) is None
    with pytest.raises(SatTrainError) as caught:
        find_weights(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_a_latest_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "latest")
    assert read_latest(tmp_path) is None
    with pytest.raises(SatTrainError):
        find_weights(tmp_path)


def test_a_rank_with_a_number_out_of_this_world_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_9999999999_model_states.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"lacks mp_rank_00_model_states\.pt"):
        find_weights(tmp_path)
