"""Weights of network modules in a file of their own: what it says of itself, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sat_train.checkpoint.manifest import BaseWeights
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import ProcessMesh, start_single_process
from sat_train.errors import CheckpointError, ConfigError
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import base_weights_at, load_weights, locate_weights, read_located
from sat_train.interchange.module_files import HEADER, check_module_files, read_module_file, read_module_files
from sat_train.models.build import build_dit
from sat_train.training.models import StartWeights, read_weights_and_updates
from sat_train.weights.readers import read_metadata
from tests.unit.checkpoint.lora_runs import commit_weights
from tests.unit.testing.faulty import used, write_faulty


@pytest.fixture
def extension(tmp_path: Path) -> Path:
    return write_faulty(tmp_path)


def configuration(extension: Path, *words: str) -> RunConfig:
    return load_run_config(
        ["configs/sft.yaml"], ["--extension", str(extension), *used(), *words], check_paths=False
    )


def state(config: RunConfig) -> dict[str, torch.Tensor]:
    start_single_process()
    generator = torch.Generator().manual_seed(0)
    dit = build_dit(config.spec, device="cpu", dtype=torch.float32, initialize=False)
    return {name: torch.randn(t.shape, generator=generator) for name, t in dit.state_dict().items()}


@pytest.fixture
def trained(mesh: ProcessMesh, extension: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run with a frozen base, whose patch embedding was trained too, and all of its weights."""
    weights = state(configuration(extension))
    own = {key for key in weights if key.startswith(("mixins.fuser.", "mixins.patch_embed.proj."))}
    save_file({key: weights[key] for key in weights.keys() - own}, tmp_path / "base.safetensors")
    save_file(
        {**{key: weights[key] for key in weights if not key.startswith("mixins.fuser.")}},
        tmp_path / "whole.safetensors",
    )
    base = base_weights_at(tmp_path / "whole.safetensors")
    changed = {key: weights[key] + 1 for key in own}
    commit_weights(mesh, tmp_path / "run", 3, changed, base=base)
    return tmp_path / "run", {**weights, **changed}


def export(run: Path, config: RunConfig, dest: Path, **options: object) -> Path:
    extensions = config.extensions.tree()
    return convert(Conversion(run, dest, "modules", model=config.spec, extensions=extensions, **options))


def test_modules_over_their_base_are_the_run(extension: Path, tmp_path: Path, trained) -> None:
    run, expected = trained
    config = configuration(extension)
    folder = export(run, config, tmp_path / "out")
    check_module_files([folder], config, tmp_path / "whole.safetensors")
    start = StartWeights(locate_weights(tmp_path / "whole.safetensors"), modules=(str(folder),))
    for weights in (read_weights_and_updates(start)[0], read_located(locate_weights(run))):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    dit = build_dit(config.spec, device="cpu", dtype=torch.float32, initialize=False)
    load_weights(dit, weights)


def test_a_file_says_what_its_weights_belong_to(extension: Path, tmp_path: Path, trained) -> None:
    run, _ = trained
    config = configuration(extension)
    path = export(run, config, tmp_path / "out") / "modules.safetensors"
    weights, record = read_module_file(path)
    assert set(record.keys) == set(weights)
    (module,) = record.modules
    assert (module.name, module.target, module.params) == ("fuser", "Fuser", {"fault": ""})
    assert record.extensions == config.extensions.tree()
    assert record.base_weights == base_weights_at(tmp_path / "whole.safetensors")
    assert read_metadata(path)["sat_train.step"] == "3"


def test_single_modules_are_written_without_weights_of_the_base(
    extension: Path, tmp_path: Path, trained
) -> None:
    config = configuration(extension)
    folder = export(trained[0], config, tmp_path / "out", modules=("fuser",))
    assert all(key.startswith("mixins.fuser.") for key in read_module_files([folder]))
    with pytest.raises(CheckpointError, match=r"has no module camera\n  expected: one of fuser"):
        export(trained[0], config, tmp_path / "other", modules=("camera",))


def test_a_model_that_lacks_the_module_or_has_another_is_refused_by_name(
    extension: Path, tmp_path: Path, trained
) -> None:
    folder = export(trained[0], configuration(extension), tmp_path / "out")
    base = tmp_path / "whole.safetensors"
    without = load_run_config(["configs/sft.yaml"], ["--extension", str(extension)], check_paths=False)
    with pytest.raises(
        ConfigError, match=r"model\.modules\.fuser\.target: expected Fuser, as it was trained"
    ):
        check_module_files([folder], without, base)
    other = configuration(extension, "model.modules.fuser.params.fault=base")
    with pytest.raises(ConfigError, match=r"modules\.fuser\.params\.fault = base: expected"):
        check_module_files([folder], other, base)


def test_a_changed_extension_is_named_and_can_be_accepted(extension: Path, tmp_path: Path, trained) -> None:
    folder = export(trained[0], configuration(extension), tmp_path / "out")
    with (extension / "network.py").open("a") as file:
        file.write("# faster\n")
    with pytest.raises(ConfigError, match=r"extensions\.faulty = network\.py changed: .*accept-changed"):
        check_module_files([folder], configuration(extension), tmp_path / "whole.safetensors")
    accepted = configuration(extension, "--accept-changed-extension")
    check_module_files([folder], accepted, tmp_path / "whole.safetensors")


def test_another_base_is_logged(
    extension: Path, tmp_path: Path, trained, caplog: pytest.LogCaptureFixture
) -> None:
    config = configuration(extension)
    folder = export(trained[0], config, tmp_path / "out")
    with caplog.at_level("WARNING", logger="sat_train"):
        check_module_files([folder], config, tmp_path / "whole.safetensors")
        assert not caplog.records
        check_module_files([folder], config, tmp_path / "base.safetensors")
    assert "was trained next to" in caplog.text


def test_what_is_no_file_of_modules_is_one_error(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"mixins.fuser.embed.weight": torch.ones(2)}, plain)
    with pytest.raises(CheckpointError, match="does not say which modules it holds"):
        read_module_file(plain)
    record = {"modules": [], "extensions": {}, "keys": ["a"], "base_weights": None, "format": 1}
    for text, message in {
        "{": "manifest of a file of modules",
        json.dumps({**record, "modules": [{"name": "x"}]}): "target is missing",
        json.dumps(record): "a is not in both the file and its manifest",
    }.items():
        save_file({"b": torch.ones(2)}, plain, {HEADER: text})
        with pytest.raises(CheckpointError, match=message):
            read_module_file(plain)


def test_diffusers_has_no_modules(extension: Path, tmp_path: Path, trained) -> None:
    config = configuration(extension)
    conversion = Conversion(trained[0], tmp_path / "hf", "diffusers", model=config.spec)
    with pytest.raises(
        CheckpointError, match=r"has the modules fuser, which diffusers does not know.*\n.*\n.*--without"
    ):
        convert(conversion)
    out = convert(replace(conversion, without_modules=True))
    assert "patch_size" in json.loads((out / "transformer/config.json").read_text())


def test_a_run_that_trained_its_base_keeps_it(mesh: ProcessMesh, extension: Path, tmp_path: Path) -> None:
    config = configuration(extension)
    commit_weights(mesh, tmp_path / "full", 1, state(config))
    with pytest.raises(CheckpointError, match=r"trained its base next to the modules fuser"):
        export(tmp_path / "full", config, tmp_path / "out")
    folder = export(tmp_path / "full", config, tmp_path / "out", modules=("fuser",))
    assert read_module_file(folder / "modules.safetensors")[1].base_weights is None
    assert isinstance(base_weights_at(tmp_path / "full"), BaseWeights)
