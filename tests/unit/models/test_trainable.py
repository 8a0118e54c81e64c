"""Laws of what trains."""

import pytest

from sat_train.errors import ConfigError
from sat_train.models.trainable import group_parameters, select_trainable
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
