"""What a LoRA run remembers of the weights under its adapters: place, step and hash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sat_train.checkpoint.manifest import BaseWeights
from sat_train.config.paths import ASSETS
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.interchange.adapters import read_lora
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import base_weights_at, locate_weights, read_transformer_weights
from tests.unit.checkpoint.lora_runs import LAYER, adapters, commit_weights
from tests.unit.checkpoint.transformers import random_weights, write_sat_folder

KEY = f"{LAYER}.weight"


def lora_run(mesh: ProcessMesh, folder: Path, base: Path) -> Path:
    commit_weights(mesh, folder / "lora", 5, adapters(), base=base_weights_at(base))
    return folder / "lora"


@pytest.fixture
def base(mesh: ProcessMesh, tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(random_weights(), tmp_path / "base" / "dit.safetensors")
    return tmp_path / "base" / "dit.safetensors"


def merged(run: Path, dest: Path, **options: object) -> torch.Tensor:
    out = convert(Conversion(run, dest, "sat", merge_lora=True, **options))
    return read_transformer_weights(out)[KEY]


def test_a_base_is_remembered_by_its_absolute_path_however_it_was_typed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for typed in ("base/dit.safetensors", "base", "./base/../base/dit.safetensors"):
        result = base_weights_at(typed)
        assert Path(result.source).is_absolute()
        monkeypatch.chdir("/")
        assert base_weights_at(result.source).sha256 == result.sha256
        monkeypatch.chdir(tmp_path)
    assert base_weights_at(str(ASSETS / "tiny" / "dit.safetensors")).source == "asset:tiny/dit.safetensors"


def test_adapters_alone_are_exported_without_their_base(
    mesh: ProcessMesh, base: Path, tmp_path: Path
) -> None:
    run = lora_run(mesh, tmp_path, base)
    base.unlink()
    out = convert(Conversion(run, tmp_path / "out", "diffusers"))
    (part,), (trained,) = read_lora(out)[LAYER], read_lora(run)[LAYER]
    torch.testing.assert_close(part.delta(), trained.delta())


def test_a_base_that_has_moved_is_named_by_the_run_and_found_by_its_hash(
    mesh: ProcessMesh, base: Path, tmp_path: Path
) -> None:
    run = lora_run(mesh, tmp_path, base)
    expected = merged(run, tmp_path / "before")
    moved = base.rename(tmp_path / "moved.safetensors")
    message = rf"(?s){run}/5 was trained on the base {base} .*no such file.*--load-base"
    for use in (lambda: merged(run, tmp_path / "x"), lambda: read_transformer_weights(run)):
        with pytest.raises(CheckpointError, match=message):
            use()
    assert torch.equal(merged(run, tmp_path / "after", load_base=moved), expected)
    with pytest.raises(CheckpointError, match="but other weights were given"):
        locate_weights(run, load_base=ASSETS / "tiny" / "dit.safetensors")
    save_file(random_weights(seed=9), base)
    with pytest.raises(CheckpointError, match=f"on the base {base} .*which has changed"):
        read_transformer_weights(run)


def test_a_base_that_is_a_run_means_the_step_that_was_read(mesh: ProcessMesh, tmp_path: Path) -> None:
    full = tmp_path / "full"
    commit_weights(mesh, full, 3, random_weights())
    run = lora_run(mesh, tmp_path, full)
    expected = merged(run, tmp_path / "before")
    commit_weights(mesh, full, 7, random_weights(seed=9))
    assert torch.equal(merged(run, tmp_path / "after"), expected)
    assert locate_weights(run).base == BaseWeights(str(full / "3"), base_weights_at(full / "3").sha256)
    moved = full.rename(tmp_path / "archive")
    assert torch.equal(merged(run, tmp_path / "moved", load_base=moved), expected), "found among its steps"


def test_an_older_record_that_names_a_lora_run_still_reads(
    mesh: ProcessMesh, base: Path, tmp_path: Path
) -> None:
    first = lora_run(mesh, tmp_path, base)
    second = tmp_path / "second"
    commit_weights(mesh, second, 1, adapters(seed=4), base=base_weights_at(first))
    expected = random_weights()[KEY].double() + read_lora(second)[LAYER][0].delta(torch.float64)
    torch.testing.assert_close(merged(second, tmp_path / "out").double(), expected)


def test_a_run_that_names_itself_as_its_base_is_refused(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = tmp_path / "lora"
    commit_weights(mesh, run, 5, adapters(), base=BaseWeights("x", "x"))
    same = base_weights_at(run / "5")
    shutil.rmtree(run)
    commit_weights(mesh, run, 5, adapters(), base=same)
    with pytest.raises(CheckpointError, match="names itself as its base"):
        read_transformer_weights(run)


@pytest.mark.parametrize("module", [7, [1], {}, {"a": 1}, {"a": torch.ones(1).expand(9**9)}], ids=str)
def test_a_step_that_holds_something_else_is_one_error(
    mesh: ProcessMesh, tmp_path: Path, module: object
) -> None:
    commit_weights(mesh, tmp_path / "run", 1, module)
    with pytest.raises(CheckpointError, match="run/1"):
        convert(Conversion(tmp_path / "run", tmp_path / "out", "sat"))


def test_a_full_run_needs_no_base(mesh: ProcessMesh, tmp_path: Path) -> None:
    sat = write_sat_folder(tmp_path / "sat", random_weights())
    assert locate_weights(sat).base is None
