"""Laws of the adapters."""

import pytest
import torch

from sat_train.errors import CheckpointError, ConfigError
from sat_train.interchange.adapters import updates_of
from sat_train.models.adapter import adapted_layers, adapter_state_dict, merge_adapters
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.stack import BlockStack
from sat_train.models.frozen_layers import hold_frozen_weights
from sat_train.models.loaded_adapters import add_adapters_for, load_updates
from sat_train.weights.lazy import from_tensors
from tests.networks import SMALL, add_adapters, network_spec
from tests.unit.models.narrow import inputs, randomized

EVERYTHING = (r"attention\.", r"mlp\.", r"adaLN_modulations\.")


def adapted(*, trained: bool, rank: int = 3, alpha: float = 1.0, **options):
    """Builds an adapted transformer; `trained` gives its B matrices values, which start at zero."""
    dit = randomized()
    add_adapters(dit, rank=rank, alpha=alpha, **options)
    if trained:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for key, value in adapter_state_dict(dit).items():
                if "matrix_B" in key:
                    value.normal_(std=0.3, generator=generator)
    return dit


def test_keys_and_shapes_are_those_of_sat_s_lora2():
    shapes = {key: tuple(value.shape) for key, value in adapter_state_dict(adapted(trained=False)).items()}
    expected = {"mixins.lora.rank": (), "mixins.lora.alpha": ()}
    for layer in ("transformer.layers.0", "transformer.layers.1"):
        for i in range(3):
            expected[f"{layer}.attention.query_key_value.matrix_A.{i}"] = (3, 64)
            expected[f"{layer}.attention.query_key_value.matrix_B.{i}"] = (64, 3)
        expected[f"{layer}.attention.dense.matrix_A.0"] = (3, 64)
        expected[f"{layer}.attention.dense.matrix_B.0"] = (64, 3)
    assert shapes == expected


def test_the_base_weights_keep_their_keys_and_load_as_before():
    base = randomized()
    dit = adapted(trained=False)
    missing, unexpected = dit.load_state_dict(base.state_dict(), strict=False)
    assert set(missing) == set(adapter_state_dict(dit))
    assert unexpected == []


@pytest.mark.parametrize("targets", [EVERYTHING, (r"query_key_value$",)], ids=["everything", "qkv"])
def test_a_new_adapter_changes_nothing(targets):
    assert torch.equal(adapted(trained=False, targets=targets)(*inputs()), randomized()(*inputs()))


@pytest.mark.parametrize("targets", [EVERYTHING, (r"query_key_value$", r"dense$")], ids=["everything", "sat"])
def test_merged_equals_unmerged(targets):
    dit = adapted(trained=True, targets=targets).eval()
    plain = randomized()(*inputs())
    expected = dit(*inputs())
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
    merge_adapters(dit)
    merge_adapters(dit)
    # fp32 rounding of W + BA against Wx + B(Ax), through two blocks
    assert torch.allclose(dit(*inputs()), expected, atol=1e-5 * expected.abs().max().item())


def test_the_update_is_alpha_over_rank_times_b_a_for_each_of_q_k_v():
    dit = adapted(trained=True, rank=4, alpha=2.0)
    name = "transformer.layers.1.attention.query_key_value"
    weights = dit.state_dict()
    expected = torch.cat(
        [weights[f"{name}.matrix_B.{i}"] @ weights[f"{name}.matrix_A.{i}"] for i in range(3)]
    )
    before = weights[f"{name}.weight"].clone()
    merge_adapters(dit)
    assert torch.allclose(dit.state_dict()[f"{name}.weight"], before + expected * 2.0 / 4, atol=1e-6)


def test_initial_a_follows_the_seed_and_not_the_global_generator():
    torch.manual_seed(1)
    first = adapter_state_dict(adapted(trained=False, seed=4))
    torch.manual_seed(2)
    second = adapter_state_dict(adapted(trained=False, seed=4))
    other = adapter_state_dict(adapted(trained=False, seed=5))
    key = "transformer.layers.0.attention.query_key_value.matrix_A.1"
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first[key], other[key])
    assert first[key].abs().max() == pytest.approx(64**-0.5, rel=0.1)
    assert not first[key.replace("_A", "_B")].any()


def test_all_gradients_reach_the_adapters():
    dit = adapted(trained=True, targets=EVERYTHING)
    dit(*inputs()).square().sum().backward()
    names = [name for name, parameter in dit.named_parameters() if "matrix_" in name]
    assert len(names) == 2 * (6 + 2 + 2 + 2 + 2)
    assert all(dict(dit.named_parameters())[name].grad.any() for name in names)


def test_adapters_stay_fp32_on_half_precision_weights():
    dit = randomized().to(torch.bfloat16)
    add_adapters(dit, rank=2)
    assert {value.dtype for key, value in adapter_state_dict(dit).items() if "matrix" in key} == {
        torch.float32
    }
    assert dit(*inputs()).dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    dit = adapted(trained=True, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(dit(*inputs()), dit(*inputs()))
    dit.eval()
    assert torch.equal(dit(*inputs()), adapted(trained=True).eval()(*inputs()))


def test_compiled_adapters_over_plain_and_quantized_layers_have_no_graph_break():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    dit, expected = adapted(trained=True, targets=EVERYTHING), adapted(trained=True, targets=EVERYTHING)
    dit.recompute = "full"
    dit.compile_blocks(backend="aot_eager")
    for model in (dit, expected):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("attention" not in name or "matrix" in name)
        hold_frozen_weights(model, device=torch.device("cpu"), quantization="nf4")
        model(*inputs()).square().sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    trained = [[(n, p) for n, p in each.named_parameters() if p.requires_grad] for each in (dit, expected)]
    for (name, a), (_, b) in zip(*trained, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5 * b.grad.abs().max().item()), name


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(
        ConfigError, match=r"lora_config\.params\.targets = attn1: expected a pattern"
    ) as raised:
        add_adapters(randomized(), rank=2, targets=(r"attention\.dense$", "attn1", "to_q"))
    assert len(raised.value.faults) == 2


def updates(state_dict):
    return updates_of(from_tensors(state_dict, where="lora.safetensors"))


def test_saved_and_loaded_adapters_are_equal():
    trained, fresh = adapted(trained=True), adapted(trained=False)
    load_updates(fresh, updates(adapter_state_dict(trained)))
    assert torch.equal(fresh(*inputs()), trained(*inputs()))
    for key, value in adapter_state_dict(trained).items():
        assert torch.equal(adapter_state_dict(fresh)[key], value), key


def test_sat_s_own_adapters_load_without_rank_and_alpha():
    weights = adapter_state_dict(adapted(trained=True))
    weights = {key: value for key, value in weights.items() if "mixins.lora" not in key}
    fresh = adapted(trained=False)
    load_updates(fresh, updates(weights))
    assert torch.equal(fresh(*inputs()), adapted(trained=True)(*inputs()))


@pytest.mark.parametrize(("rank", "alpha"), [(3, 128.0), (3, 0.7), (5, 1.0), (8, 8.0)])
def test_adapters_keep_their_effect_in_a_model_of_another_alpha_or_a_higher_rank(rank, alpha):
    trained = adapted(trained=True, alpha=2.0)
    fresh = adapted(trained=False, rank=rank, alpha=alpha)
    load_updates(fresh, updates(adapter_state_dict(trained)))
    # fp32: B is scaled once and back
    torch.testing.assert_close(fresh(*inputs()), trained(*inputs()), rtol=1e-5, atol=1e-5)
    own = adapter_state_dict(fresh)
    assert (own["mixins.lora.rank"], own["mixins.lora.alpha"]) == (rank, torch.tensor(alpha))
    assert all(layer.adapter.scale == alpha / rank for _, layer in adapted_layers(fresh)), (
        "the scale that computes is the one that is exported"
    )
    spare = own["transformer.layers.0.attention.dense.matrix_A.0"][3:]
    assert spare.any(dim=1).all(), "ranks that begin at zero can learn"


def test_a_model_gets_exactly_the_adapters_of_a_file():
    trained = adapted(trained=True, alpha=2.0, targets=(r"layers\.1\.attention\.dense$",))
    bare = randomized()
    add_adapters_for(bare, updates(adapter_state_dict(trained)))
    assert adapter_state_dict(bare).keys() == adapter_state_dict(trained).keys()
    assert torch.equal(bare(*inputs()), trained(*inputs()))
    with pytest.raises(CheckpointError, match="layers that this model does not have: nowhere"):
        add_adapters_for(randomized(), {"nowhere": next(iter(updates(adapter_state_dict(trained)).values()))})


def test_adapters_that_do_not_fit_are_refused_whole():
    fresh = adapted(trained=False)
    before = {key: value.clone() for key, value in adapter_state_dict(fresh).items()}
    with pytest.raises(CheckpointError, match=r"(?s)\(4 faults\).*dense has an update of rank 4, .* rank 3"):
        load_updates(fresh, updates(adapter_state_dict(adapted(trained=True, rank=4))))
    with pytest.raises(CheckpointError, match=r"mlp\.dense_h_to_4h does not exist"):
        load_updates(fresh, updates(adapter_state_dict(adapted(trained=True, targets=EVERYTHING))))
    weights = adapter_state_dict(adapted(trained=True))
    short = {**weights, "transformer.layers.0.attention.dense.matrix_B.0": torch.ones(60, 3)}
    with pytest.raises(
        CheckpointError, match=r"dense has an update of shape \[60, 64\], and its weight is \[64, 64\]"
    ):
        load_updates(fresh, updates(short))
    del weights["transformer.layers.0.attention.dense.matrix_B.0"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.dense has 1 matrix_A and 0 matrix_B"):
        load_updates(fresh, updates(weights))
    assert all(torch.equal(value, before[key]) for key, value in adapter_state_dict(fresh).items())


def test_merged_adapters_do_not_train():
    dit = adapted(trained=True)
    merge_adapters(dit)
    with pytest.raises(AssertionError, match="merged into the weights do not train"):
        dit(*inputs())


def test_adapts_on_the_meta_device():
    dit = randomized(device="meta", init_seed=None)
    add_adapters(dit, rank=2)
    assert {value.device.type for value in dit.state_dict().values()} == {"meta"}
    assert len(list(adapted_layers(dit))) == 4


def test_adapters_go_to_the_base_and_not_into_a_branch_of_its_blocks():
    class Branch(Mixin):
        def __init__(self):
            super().__init__()
            self.stack = BlockStack(network_spec(**SMALL), layers=1)

    dit = randomized()
    dit.add_mixin("branch", Branch())
    add_adapters(dit, rank=3)
    assert {name.split(".")[0] for name, _ in adapted_layers(dit)} == {"transformer"}
