"""Laws of what trains."""

import re

import pytest

from sat_train.errors import ConfigError
from sat_train.models.trainable import TrainRule, group_parameters, group_table, select_trainable
from tests.networks import add_adapters, build_network
from tests.unit.models.narrow import inputs


def trainable_names(dit):
    return {name for name, parameter in dit.named_parameters() if parameter.requires_grad}


def test_everything_trains_without_prefixes_but_the_fixed_table():
    dit = build_network(positions="sincos")
    summary = select_trainable(dit)
    assert summary.frozen == {}
    assert summary.num_trainable == sum(p.numel() for p in dit.parameters())
    assert not any("pos_embed" in name for name in trainable_names(dit))


@pytest.mark.parametrize("prefix", ["transformer.layers", "model.diffusion_model.transformer.layers"])
def test_prefixes_freeze_with_and_without_cogvideo_s_own(prefix):
    dit = build_network()
    summary = select_trainable(dit, not_trainable_prefixes=[prefix, "time_embed"])
    assert not any(name.startswith(("transformer.layers", "time_embed")) for name in trainable_names(dit))
    assert "transformer.final_layernorm.weight" in trainable_names(dit)
    assert set(summary.frozen) == {"transformer.layers", "time_embed"}
    dit(*inputs()).sum().backward()
    assert dit.time_embed[0].weight.grad is None


def test_all_leaves_the_adapters_alone():
    dit = build_network()
    add_adapters(dit, rank=2)
    summary = select_trainable(dit, not_trainable_prefixes=["all"])
    assert all("matrix_" in name for name in trainable_names(dit))
    assert summary.num_trainable == 2 * (3 * 2 + 1 * 2) * 64 * 2
    table = str(summary)
    assert f"{summary.num_trainable:,}" in table
    assert "mixins.adaln_layer" in table


def test_names_of_the_frozen_helpers_are_taken_for_granted():
    dit = build_network()
    select_trainable(dit, not_trainable_prefixes=["first_stage_model", "conditioner"])
    assert len(trainable_names(dit)) == len(list(dit.parameters()))


def test_nothing_left_to_train_is_an_error_that_lists_the_prefixes():
    with pytest.raises(ConfigError, match=r"not_trainable_prefixes = \['all'\].*under one of .*time_embed"):
        select_trainable(build_network(), not_trainable_prefixes=["all"])


def test_a_prefix_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"not_trainable_prefixes = transformer\.layer_s: expected 'all'"):
        select_trainable(build_network(), not_trainable_prefixes=["transformer.layer_s", "time_embed"])


def test_matrices_decay_and_vectors_do_not():
    dit = build_network(positions="rotary_learned")
    select_trainable(dit)
    decay, no_decay = group_parameters(dit, weight_decay=0.1)
    assert (decay.name, decay.weight_decay, no_decay.name, no_decay.weight_decay) == (
        "decay",
        0.1,
        "no_decay",
        0.0,
    )
    names = set(no_decay.names)
    assert names == {name for name, p in dit.named_parameters() if p.dim() == 1}
    assert len(decay.names) + len(names) == len(list(dit.parameters()))


def test_there_is_no_empty_group():
    """A torch schedule counts groups that DeepSpeed drops."""
    dit = build_network()
    add_adapters(dit, rank=2)
    select_trainable(dit, not_trainable_prefixes=["all"])
    groups = group_parameters(dit, weight_decay=0.1)
    assert [group.name for group in groups] == ["decay"]


def rule(match, lr_factor=1.0, name="patches"):
    return TrainRule(f"model.train.{name}", (match,), lr_factor)


def test_train_wins_over_freeze_and_prefixes():
    dit = build_network()
    everything = trainable_names(dit)
    select_trainable(dit, freeze=[r"time_embed", r"layers\.1\."], train=[rule(r"layers\.1\.mlp")])
    frozen = everything - trainable_names(dit)
    assert frozen == {
        name for name in everything if re.search(r"time_embed|layers\.1\.", name) and "1.mlp" not in name
    }
    select_trainable(dit, not_trainable_prefixes=["all"], train=[rule(r"patch_embed\.proj")])
    assert trainable_names(dit) == {name for name in everything if "patch_embed.proj" in name}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"freeze": ["tim_embed"]}, r"model\.freeze = tim_embed: expected a pattern .*such as time_embed"),
        ({"train": [rule(r"layers\.99\.")]}, r"model\.train\.patches\.match = layers.*finds a weight, such"),
    ],
)
def test_a_pattern_that_finds_nothing_is_an_error_with_near_names(options, says):
    with pytest.raises(ConfigError, match=says):
        select_trainable(build_network(), **options)


def test_a_lora_does_not_train_its_base_which_is_not_saved_with_it():
    dit = build_network()
    add_adapters(dit, rank=2)
    select_trainable(
        dit, not_trainable_prefixes=["all"], freeze=[r"dense\.matrix_"], train=[rule("matrix_B")]
    )
    assert all(re.search(r"value\.matrix_|matrix_B", name) for name in trainable_names(dit))
    with pytest.raises(
        ConfigError, match=r"expected adapters and added modules only, not time_embed\.0\.bias"
    ):
        select_trainable(dit, not_trainable_prefixes=["all"], train=[rule("time_embed")])


def test_rules_give_groups_of_their_own_rate_and_a_table():
    dit = build_network()
    select_trainable(dit)
    groups = group_parameters(dit, weight_decay=0.1, rules=[rule("patch_embed", 0.1)])
    by_name = {group.name: group for group in groups}
    assert list(by_name) == ["patches decay", "decay", "patches no_decay", "no_decay"]
    assert {(group.lr_factor, group.weight_decay) for group in groups} == {
        (0.1, 0.1),
        (1, 0.1),
        (0.1, 0),
        (1, 0),
    }
    assert sorted(name for group in groups for name in group.names) == sorted(trainable_names(dit))
    assert all("patch_embed" in name for name in by_name["patches decay"].names)
    rows = [line.split() for line in group_table(groups, dit, lr=1e-3).splitlines()]
    assert [row[-2] for row in rows[1:]] == ["0.0001", "0.001", "0.0001", "0.001"]
    counts = [int(row[-3].replace(",", "")) for row in rows[1:]]
    assert sum(counts) == sum(p.numel() for p in dit.parameters())


def test_two_factors_for_one_weight_are_an_error():
    dit = build_network()
    rules = [rule("patch_embed", 0.1), rule(r"proj\.weight", 2.0, "projections")]
    with pytest.raises(ConfigError, match=r"patches = 0\.1: expected one factor for .*projections gives 2"):
        group_parameters(dit, weight_decay=0.1, rules=rules)
