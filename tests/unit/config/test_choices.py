"""Choices that a configuration makes for a person, and those it refuses to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sat_train.config import load_run_config
from sat_train.config.catalog import all_keys, suggest_value
from sat_train.config.other_trainers import OTHER_WORDS, OUR_KEYS
from sat_train.errors import ConfigError

LORA = "configs/lora.yaml"
SFT = "configs/sft.yaml"


def refusal(base: list[str], *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(base, list(words))
    return str(caught.value)


def test_videos_are_sampled_at_the_rate_of_the_data() -> None:
    assert load_run_config([SFT], ["data.params.fps=12"]).sampling_fps == 12
    assert load_run_config([SFT], ["data.params.fps=12", "args.sampling_fps=24"]).sampling_fps == 24


def test_gradients_in_turns_are_refused_because_masters_would_be_another_parameter_s() -> None:
    message = refusal([SFT], "deepspeed.zero_optimization.round_robin_gradients=true")
    assert "deepspeed.zero_optimization.round_robin_gradients = true" in message


def test_a_lora_target_that_is_no_pattern_is_named_with_its_place() -> None:
    message = refusal([LORA], "model.network_config.params.modules.lora_config.params.targets=['a', '(']")
    assert "lora_config.params.targets.1 = (" in message


@pytest.mark.parametrize("word", sorted(OUR_KEYS))
def test_a_word_of_another_trainer_is_answered_with_ours(word: str) -> None:
    message = refusal([SFT], f"args.{word}=1")
    if f"args.{word}" not in OUR_KEYS.values():
        assert OUR_KEYS[word].rpartition(".")[2] in message


def choices_of(path: str) -> list[str]:
    expected = all_keys()[path].expected
    named = expected.removeprefix("one of ").removesuffix(" or null")
    return named.split(", ") if expected.startswith("one of ") else []


def test_another_word_for_a_value_is_answered_with_ours_and_never_with_one_spelt_alike() -> None:
    for (path, word), ours in OTHER_WORDS.items():
        everywhere = [key for key in all_keys() if ours in choices_of(key) and word not in choices_of(key)]
        keys = everywhere if path == "*" else [path]
        assert keys, (path, ours)
        for key in keys:
            choices = choices_of(key)
            assert ours in choices, f"{key} has no {ours}"
            assert word not in choices, f"{word} is a value of {key} itself"
            known_here = OTHER_WORDS.get((key, word), ours)
            assert suggest_value(word, choices, key) == known_here, (key, word)
    message = refusal([SFT], "args.text_encoder_device=cuda")
    assert "args.text_encoder_device = cuda: expected one of auto, cpu; did you mean 'auto'?" in message


def test_a_value_is_suggested_for_a_slip_but_not_for_a_word_with_other_digits() -> None:
    named = [(key, choice) for key in all_keys() for choice in choices_of(key) if len(choice) > 4]
    assert len(named) > 40
    for key, choice in named:
        slip = choice[:2] + choice[3:]
        assert suggest_value(slip, choices_of(key), key), (key, slip)
        for digit in filter(str.isdigit, choice):
            other = choice.replace(digit, "7")
            assert suggest_value(other, choices_of(key), key) != choice, (key, other)


@pytest.mark.parametrize("number", [0, "0"], ids=["a number", "a text"])
def test_one_text_encoder_can_be_changed_by_its_number_in_yaml(tmp_path: Path, number: int | str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model": {"conditioner_config": {"params": {"emb_models": {number: {"ucg_rate": 0.25}}}}}}
        )
    )
    config = load_run_config([SFT, str(path)], [])
    (embedder,) = config.model.conditioner_config.params.emb_models
    assert embedder.ucg_rate == 0.25
    assert embedder.params.model_dir, "the rest stays"
