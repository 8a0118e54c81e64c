"""One setting, two spellings, one value."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sat_train.config import load_run_config
from sat_train.config.aliases import SAME, get_value
from sat_train.config.catalog import all_keys
from sat_train.config.loading import leaves
from sat_train.errors import ConfigError
from tests.unit.config.conftest import Load

OTHER_VALUES = {
    "args.lr": 0.5,
    "args.weight_decay": 0.5,
    "args.batch_size": 7,
    "args.gradient_accumulation_steps": 7,
    "args.clip_grad": 0.5,
    "args.zero_stage": 3,
    "args.fp16": True,
    "args.bf16": True,
    "args.checkpoint_activations": "attention",
    "args.model_parallel_size": 2,
}
PAIRS = [(first, second) for first, second in SAME.items()]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("spelled", [0, 1])
def test_both_spellings_hold_the_one_value(first: str, second: str, spelled: int, load: Load) -> None:
    value = OTHER_VALUES[first]
    config = load("", f"{(first, second)[spelled]}={value}")
    values = leaves(config.tree())
    assert values[first] == values[second] == value
    assert config.sources[first] == config.sources[second] == "command line"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_defaults_of_both_spellings_agree(first: str, second: str, load: Load) -> None:
    assert all_keys()[first].default == all_keys()[second].default
    values = leaves(load().tree())
    assert values[first] == values[second]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_later_file_wins_whichever_spelling_it_uses(
    first: str, second: str, earlier: int, write: Callable[[str, str], str]
) -> None:
    pair = (first, second)
    other = {"args.zero_stage": 2, "args.model_parallel_size": 1}.get(first, OTHER_VALUES[first] * 2)
    old = write(
        "old.yaml", json.dumps(nested(pair[earlier], not other if isinstance(other, bool) else other))
    )
    new = write("new.yaml", json.dumps(nested(pair[1 - earlier], OTHER_VALUES[first])))
    config = load_run_config(["configs/sft.yaml", old, new], check_paths=False)
    values = leaves(config.tree())
    assert values[first] == values[second] == OTHER_VALUES[first]
    assert config.sources[first] == config.sources[second] == new


def test_words_win_over_the_other_spelling_in_the_last_file(load: Load) -> None:
    config = load("deepspeed: {optimizer: {params: {lr: 0.3}}}", "args.lr=0.1")
    assert (config.args.lr, config.deepspeed.optimizer.params.lr) == (0.1, 0.1)
    config = load("args: {lr: 0.3}", "deepspeed.optimizer.params.lr=0.1")
    assert (config.args.lr, config.sources["args.lr"]) == (0.1, "command line")


def test_only_a_file_that_contradicts_itself_is_a_fault(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("args: {batch_size: 3}\ndeepspeed: {train_micro_batch_size_per_gpu: 4}")
    (line,) = map(str, caught.value.faults)
    assert "args.batch_size = 3: expected the same as deepspeed.train_micro_batch_size_per_gpu = 4" in line
    assert line.count("behind.yaml]") == 2


@pytest.mark.parametrize("word", ["args.batch_size", "deepspeed.train_micro_batch_size_per_gpu"])
def test_true_is_not_the_number_one_in_either_spelling(word: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=f"{word} = true: expected a whole number"):
        load("args: {batch_size: 1}", f"{word}=true")


def nested(path: str, value: object) -> object:
    """Returns the tree that holds one value at a dotted path."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def test_two_words_that_contradict_each_other(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"args\.lr = 0\.1: expected the same as deepspeed"):
        load("", "args.lr=0.1", "deepspeed.optimizer.params.lr=0.2")


def test_equal_values_are_no_contradiction(load: Load) -> None:
    assert load("args: {lr: 0.00001, clip_grad: 0.1}").args.lr == 1e-5


def test_a_later_model_file_wins_over_earlier_sampling_arguments(load: Load) -> None:
    first = "args: {sampling_steps: 20}"
    config = load(first, "model.sampler_config.params.num_steps=7")
    assert config.args.sampling_steps == config.model.sampler_config.params.num_steps == 7


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--sampling-steps", "7"], "model.sampler_config.params.num_steps", 7),
        (["--sampler", "DDIM"], "model.sampler_config.target", "DDIM"),
        (["--guidance-scale", "3"], "model.sampler_config.params.guider_config.params.scale", 3),
        (["model.sampler_config.params.num_steps=7"], "args.sampling_steps", 7),
    ],
)
def test_sampling_arguments_win_over_the_model(
    words: list[str], path: str, value: object, load: Load
) -> None:
    config = load("args: {sampling_steps: 20, sampler: DPMPP2M, guidance_scale: 5}", *words)
    assert leaves(config.tree())[path] == value


def test_steps_from_the_command_line_are_guidances_too(load: Load) -> None:
    text = "model: {sampler_config: {params: {guider_config: {params: {num_steps: 50}}}}}"
    config = load(text, "--sampling-steps", "10")
    assert config.model.sampler_config.params.guider_config.params.num_steps == 10


def test_values_in_lists_are_found() -> None:
    assert get_value({"a": [{"b": 1}]}, "a.0.b") == 1
