"""One setting, two spellings, one value."""

from __future__ import annotations

import pytest

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
    "args.checkpoint_activations": True,
    "args.model_parallel_size": 2,
}
PAIRS = [(first, second) for first, second in SAME.items()]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("spelled", [0, 1])
def test_both_spellings_hold_the_one_value(first: str, second: str, spelled: int, load: Load) -> None:
    value = OTHER_VALUES[first]
    run = load("", f"{(first, second)[spelled]}={value}")
    values = leaves(run.tree())
    assert values[first] == values[second] == value
    assert run.sources[first] == run.sources[second] == "command line"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_defaults_of_both_spellings_agree(first: str, second: str, load: Load) -> None:
    assert all_keys()[first].default == all_keys()[second].default
    values = leaves(load().tree())
    assert values[first] == values[second]


def test_a_contradiction_names_both_files(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("args: {batch_size: 3}")
    message = str(caught.value)
    assert "args.batch_size = 3: expected the same as deepspeed.train_micro_batch_size_per_gpu = 2" in message
    assert "[configs/sft.yaml]" in message
    assert "behind.yaml]" in message


def test_two_words_that_contradict_each_other(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"args\.lr = 0\.1: expected the same as deepspeed"):
        load("", "args.lr=0.1", "deepspeed.optimizer.params.lr=0.2")


def test_equal_values_are_no_contradiction(load: Load) -> None:
    assert load("args: {lr: 0.00001, clip_grad: 0.1}").args.lr == 1e-5


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
    run = load("args: {sampling_steps: 20, sampler: DPMPP2M, guidance_scale: 5}", *words)
    assert leaves(run.tree())[path] == value


def test_steps_from_the_command_line_are_guidances_too(load: Load) -> None:
    told = "model: {sampler_config: {params: {guider_config: {params: {num_steps: 50}}}}}"
    run = load(told, "--sampling-steps", "10")
    assert run.model.sampler_config.params.guider_config.params.num_steps == 10


def test_values_in_lists_are_found() -> None:
    assert get_value({"a": [{"b": 1}]}, "a.0.b") == 1
