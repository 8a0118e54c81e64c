"""Sampling from a run directory takes the model that the run trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.config import load_run_config
from sat_train.config.resolved import write_resolved
from sat_train.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run of LoRA on a 5B model, without its checkpoints."""
    base = [CONFIGS / "model" / "cogvideox_5b.yaml", CONFIGS / "lora.yaml"]
    words = ["model.network_config.params.modules.lora_config.params.r=16", "args.train_data=[x]"]
    folder = tmp_path / "lora-20260101-120000"
    (folder / "2").mkdir(parents=True)
    write_resolved(load_run_config(base, words, check_paths=False), folder / "resolved.yaml")
    return folder


def _sample(load: Path, *words: str, base: tuple[Path, ...] = ()):
    return load_run_config(
        [*base, CONFIGS / "sample.yaml"],
        ["--prompt", "x", "--load", str(load), *words],
        purpose="sample",
        check_paths=False,
    )


@pytest.mark.parametrize("inside", ["", "2"])
def test_model_size_and_precision_are_the_runs(run_directory, inside):
    config = _sample(run_directory / inside)
    network = config.model.network_config.params
    assert (network.num_layers, network.modules.lora_config.params.r) == (42, 16)
    assert config.data.params.video_size == (480, 720)
    assert config.args.bf16
    assert config.sources["model.scale_factor"].endswith("resolved.yaml")
    assert not any("embedded" in note for note in config.notes)


def test_what_belongs_to_the_training_is_not_taken(run_directory):
    config = _sample(run_directory)
    assert config.args.mode == "inference"
    assert config.args.train_data is None
    assert config.args.load == str(run_directory)


def test_words_and_files_win(run_directory):
    assert _sample(run_directory, "--sampling-steps", "7").args.sampling_steps == 7
    chosen = _sample(run_directory, base=(CONFIGS / "model" / "cogvideox_tiny.yaml",))
    assert chosen.model.network_config.params.num_layers == 6


def test_other_weights_leave_the_embedded_model(tmp_path):
    config = _sample(tmp_path)
    assert any("embedded" in note for note in config.notes)


def test_a_damaged_resolved_yaml_is_named(run_directory):
    (run_directory / "resolved.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"resolved\.yaml.*readable YAML"):
        _sample(run_directory)
