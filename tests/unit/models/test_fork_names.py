"""`trainable_modules` and `train_prefix` of SAT's forks train here the weights that they train there."""

from __future__ import annotations

import random
import re

import pytest
from torch import nn

from sat_train.config.layers import Merged
from sat_train.config.trained_names import translate_trained_names
from sat_train.errors import ConfigError
from sat_train.models.trainable import TrainRule, select_trainable
from tests.networks import build_network
from tests.unit.models.mixins import Branch, Fuser

WORDS = ("fuser", "traj_branch", "attention", "layers", "model", "diffusion_model", "mixins", "dense", "1")
PATTERNS = (
    *WORDS,
    *(r"layers\.\d+$", r"attention\.(dense|query_key_value)", r"per_block\.[01]", "adaln_layer", r"mlp.*4h"),
    *(r"^model\.diffusion_model\.mixins\.fuser", r"model.diffusion_model.time_embed", "nowhere", r"0\.1"),
)


@pytest.fixture
def dit() -> nn.Module:
    network = build_network()
    network.add_mixin("fuser", Fuser(0, 1))
    network.add_mixin("traj_branch", Branch(1))
    return network


def engine_of(dit: nn.Module) -> nn.Module:
    """Returns the transformer where SAT's engine has it."""
    engine, wrapper = nn.Module(), nn.Module()
    wrapper.diffusion_model, engine.model = dit, wrapper
    return engine


def trained_by_modules(dit: nn.Module, trained: list[str], excluded: list[str]) -> set[str]:
    """As Tora: module after module, outer ones first, decides for all weights in it."""
    state: dict[str, bool] = {}
    for name, module in engine_of(dit).named_modules():
        chosen = any(word == "all" or re.search(word, name) for word in trained)
        chosen = chosen and not any(re.search(word, name) for word in excluded)
        state |= {f"{name}.{weight}".lstrip("."): chosen for weight, _ in module.named_parameters()}
    return {name.removeprefix("model.diffusion_model.") for name, chosen in state.items() if chosen}


def trained_by_prefixes(dit: nn.Module, trained: dict[str, list[str]], excluded: list[str]) -> set[str]:
    """As hallo3: a name trains that holds both words of a pair, unless it holds an excluded word."""
    names = [name for name, _ in engine_of(dit).named_parameters()]
    pairs = [(first, second) for first, words in trained.items() for second in words]
    return {
        name.removeprefix("model.diffusion_model.")
        for name in names
        if any(first in name and second in name for first, second in pairs)
        and not any(word in name for word in excluded)
    }


def trained_here(dit: nn.Module, model: dict[str, object]) -> set[str] | None:
    """Returns what the translated settings train; None where a pattern finds nothing."""
    merged, faults = Merged(tree={"model": model}), []
    translate_trained_names(merged, faults)
    assert not faults
    assert model.keys() == {"freeze", "train"}
    rules = [TrainRule(name, tuple(each["match"]), 1.0) for name, each in model["train"].items()]
    try:
        select_trainable(dit, freeze=model["freeze"], train=rules, added=tuple(dit.modules_of_its_own()))
    except ConfigError:
        return None
    return {name for name, weight in dit.named_parameters() if weight.requires_grad}


def test_trainable_modules_train_the_same_weights(dit: nn.Module) -> None:
    random.seed(0)
    compared = 0
    for _ in range(150):
        trained = random.sample([*PATTERNS, "all"], random.randint(1, 3))
        excluded = random.sample(PATTERNS, random.choice([0, 0, 1, 2]))
        key = {"not_trainable_modules": excluded} if excluded else {}
        here = trained_here(dit, {"trainable_modules": trained, "not_trainable_prefixes": ["x"], **key})
        there = trained_by_modules(dit, trained, excluded)
        if here is None:  # there it trains without a word what is left of the patterns
            assert any(not trained_by_modules(dit, [each], excluded) for each in trained)
        else:
            compared += bool(here)
            assert here == there, (trained, excluded)
    assert compared > 60


def test_train_prefix_trains_the_same_weights(dit: nn.Module) -> None:
    random.seed(0)
    compared = 0
    words = (*WORDS, "diffusion_model.mixins", "model.transformer", "l.time", ".")
    for _ in range(150):
        trained = {
            first: random.sample(words, random.randint(1, 2))
            for first in random.sample(words, random.randint(1, 2))
        }
        excluded = random.sample(words, random.choice([0, 0, 1]))
        key = {"not_trainable_prefixes": excluded} if excluded else {}
        here = trained_here(dit, {"train_prefix": trained, **key})
        there = trained_by_prefixes(dit, trained, excluded)
        if here is None:
            pairs = [{first: [second]} for first, seconds in trained.items() for second in seconds]
            assert any(not trained_by_prefixes(dit, pair, excluded) for pair in pairs)
        else:
            compared += bool(here)
            assert here == there, (trained, excluded)
    assert compared > 60
