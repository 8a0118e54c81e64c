"""Defaults < files in order < command line, always; and each value knows where it came from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sat_train.config import load_run_config
from sat_train.config.layers import EMBEDDED, Layer, merge_layers
from sat_train.errors import ConfigError
from tests.unit.config.conftest import Load

Write = Callable[[str, str], str]


def test_default_then_files_in_order_then_words(write: Write) -> None:
    first = write("first.yaml", "args: {seed: 1, log_interval: 5, num_workers: 2}")
    second = write("second.yaml", "args: {seed: 2, log_interval: 6}")
    config = load_run_config(["configs/sft.yaml", first, second], ["args.seed=3"], check_paths=False)
    assert (config.args.seed, config.sources["args.seed"]) == (3, "command line")
    assert (config.args.log_interval, config.sources["args.log_interval"]) == (6, second)
    assert (config.args.num_workers, config.sources["args.num_workers"]) == (2, first)
    assert (config.args.train_iters, config.sources["args.train_iters"]) == (1000, "configs/sft.yaml")
    assert (config.args.prefetch_factor, config.sources["args.prefetch_factor"]) == (4, "default")


@pytest.mark.parametrize("words", [("args.seed=7",), ("--seed", "7"), ("--seed=7",)])
def test_the_command_line_wins_whatever_its_notation(words: tuple[str, ...], load: Load) -> None:
    assert load("args: {seed: 5}", *words).args.seed == 7


def test_groups_merge_and_lists_are_replaced(load: Load) -> None:
    config = load("args: {valid_prompts: [one]}\ndeepspeed: {optimizer: {params: {eps: 1e-6}}}")
    assert config.args.valid_prompts == ("one",)
    assert (config.deepspeed.optimizer.params.eps, config.deepspeed.optimizer.params.lr) == (1e-6, 1e-5)


def test_each_file_once_at_its_first_mention(write: Write) -> None:
    write("parts/common.yaml", "args: {seed: 1}")
    middle = write("middle.yaml", "base: parts/common.yaml\nargs: {seed: 2}")
    last = write("last.yaml", "base: [middle.yaml, parts/common.yaml]\nargs: {log_interval: 3}")
    config = load_run_config(["configs/sft.yaml", middle, last], check_paths=False)
    assert (config.args.seed, config.args.log_interval) == (2, 3)


def test_files_that_name_each_other_end(write: Write) -> None:
    left = write("left.yaml", "base: [right.yaml]\nargs: {seed: 1}")
    write("right.yaml", "base: [left.yaml]\nargs: {seed: 2}")
    assert load_run_config(["configs/sft.yaml", left], check_paths=False).args.seed == 1


def test_lora_behind_a_model_file_includes_sft_behind_it() -> None:
    config = load_run_config(["configs/model/cogvideox_5b.yaml", "configs/lora.yaml"], purpose="check")
    assert config.model.network_config.params.num_layers == 42
    assert config.sources["args.train_iters"] == "configs/sft.yaml"
    assert config.deepspeed.optimizer.params.lr == 1e-3
    assert not any(note.startswith("No file chooses a network") for note in config.notes)


def test_no_network_means_the_embedded_one(load: Load) -> None:
    config = load()
    assert config.model.network_config.params.hidden_size == 128
    assert config.sources["model.network_config.params.hidden_size"] == EMBEDDED
    assert config.notes[0] == f"No file chooses a network: the embedded tiny model is used ({EMBEDDED})."


def test_a_part_of_the_model_keeps_the_embedded_rest(load: Load) -> None:
    config = load("model: {network_config: {params: {num_layers: 3}}}")
    assert (
        config.model.network_config.params.num_layers,
        config.model.network_config.params.hidden_size,
    ) == (
        3,
        128,
    )


def test_no_files_at_all_trains_the_embedded_model() -> None:
    config = load_run_config([], ["--train-iters", "5", "--train-data", "x"], check_paths=False)
    assert config.model.network_config.params.num_layers == 6


def test_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run_config(["configs/lora.yaml"], check_paths=False).args.experiment_name == "lora"


def test_a_file_here_comes_before_one_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    shutil.copy("configs/sft.yaml", tmp_path / "configs/sft.yaml")
    with (tmp_path / "configs/sft.yaml").open("a") as file:
        file.write("  steps_per_print: 77\n")
    monkeypatch.chdir(tmp_path)
    assert load_run_config(["configs/sft.yaml"], check_paths=False).deepspeed.steps_per_print == 77


def test_references_to_other_keys(load: Load) -> None:
    config = load(
        "args: {experiment_name: 'lr-${deepspeed.optimizer.params.lr}', sampling_fps: '${data.params.fps}'}"
    )
    assert config.args.experiment_name == "lr-1e-05"
    assert config.args.sampling_fps == 8


def test_a_new_target_keeps_only_what_it_knows(load: Load) -> None:
    position = "pos_embed_config: {target: Sincos3DPositionEmbedding}"
    config = load(f"model: {{network_config: {{params: {{modules: {{{position}}}}}}}}}")
    slot = config.model.network_config.params.modules.pos_embed_config
    assert slot.target == "Sincos3DPositionEmbedding"
    assert (
        slot.params.text_length == 32
    )  # known to both; hidden_size_head, known to the rotary one only, is gone


def test_a_new_sampler_keeps_steps_and_guidance(load: Load) -> None:
    sampler = load(
        "", "model.sampler_config.params.num_steps=9", "model.sampler_config.target=DDIM"
    ).model.sampler_config
    assert (sampler.target, sampler.params.num_steps, sampler.params.guider_config.params.scale) == (
        "DDIM",
        9,
        3.0,
    )


def test_null_takes_a_group_away(write: Write) -> None:
    words = ["model.network_config.params.modules.lora_config=null", "model.not_trainable_prefixes=[]"]
    config = load_run_config(["configs/lora.yaml"], words, check_paths=False)
    assert config.model.network_config.params.modules.lora_config is None


def test_a_place_in_a_list_from_the_command_line(load: Load) -> None:
    config = load("", "model.conditioner_config.params.emb_models.0.ucg_rate=0.25")
    encoder = config.model.conditioner_config.params.emb_models[0]
    assert (encoder.ucg_rate, encoder.params.max_length) == (0.25, 32)
    assert config.sources["model.conditioner_config.params.emb_models.0.ucg_rate"] == "command line"
    assert config.sources["model.conditioner_config.params.emb_models.0.params.max_length"] == EMBEDDED


def test_a_place_outside_the_list_is_a_fault(load: Load) -> None:
    with pytest.raises(ConfigError, match="emb_models"):
        load("", "model.conditioner_config.params.emb_models.3.ucg_rate=0.25")


def test_assets_become_paths_of_shipped_files(load: Load) -> None:
    (train,) = load().args.train_data
    assert Path(train).is_absolute()
    assert (Path(train) / "videos").is_dir()


def test_records_cannot_be_changed(load: Load) -> None:
    with pytest.raises(Exception, match="frozen"):
        load().args.seed = 5


def test_sources_know_every_value(load: Load) -> None:
    from sat_train.config.loading import leaves

    config = load()
    assert set(leaves(config.tree())) == set(config.sources)


def test_an_incomplete_configuration_names_what_it_needs() -> None:
    config = load_run_config(["configs/model/cogvideox_5b.yaml"], purpose="check", check_paths=False)
    line = config.needs
    assert "to train it needs\n  - args.train_iters" in line
    assert "args.train_data" in line
    config = load_run_config(["configs/sample.yaml"], purpose="check", check_paths=False)
    assert "to sample it needs\n  - args.prompt" in config.needs


@pytest.mark.parametrize("value", [1, [1, 2]])
@pytest.mark.parametrize("before", [{"x": 1, "y": {"z": 2}}, [{"x": 1}, 2]])
def test_a_value_that_replaces_another_leaves_no_source_below_it(before: object, value: object) -> None:
    trees = {"first": {"a": before, "ab": 1}, "second": {"a": {"0": {"x": 3}}}, "last": {"a": value}}
    merged = merge_layers([Layer(name, {"args": tree}, {}) for name, tree in trees.items()])
    assert merged.sources == {"args": "first", "args.a": "last", "args.ab": "first"}
