"""Variants of LoRA: new ones change nothing, merged ones compute the same, PEFT computes what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sat_train.config.parts.adapter_parts import AdapterConfig
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError, ConfigError
from sat_train.interchange.adapters import merge_updates, updates_of, without_adapters
from sat_train.models.adapter import adapted_layers, adapter_state_dict, merge_adapters, start_adapters
from sat_train.models.loaded_adapters import add_adapters_for, load_updates
from sat_train.models.low_rank import LowRank, stacked, strengthened, truncated
from sat_train.weights.lazy import from_tensors
from tests.networks import add_adapters
from tests.unit.models.narrow import inputs, randomized

EVERYTHING = (
    r"attention\.",
    r"mlp\.",
    r"adaLN_modulations\.",
    "text_proj",
    "time_embed",
    "final_layer.linear",
)
PATTERNS = {
    "rank_pattern": [[r"attention\.dense$", 5], ["attention", 2]],
    "alpha_pattern": [[r"layers\.1.*query_key_value", 7.0]],
}
VARIANTS = {
    "rslora": ("Lora", {"use_rslora": True, **PATTERNS}),
    "dora": ("Dora", {}),
    "dora_patterns": ("Dora", {"use_rslora": True, **PATTERNS}),
    "pissa": ("Pissa", PATTERNS),
}


def adapted(
    mesh: ProcessMesh, variant: str, *, trained: bool, dtype: torch.dtype = torch.float32, **settings: Any
):
    """Builds a transformer with started adapters; `trained` moves their weights by noise."""
    kind, own = VARIANTS[variant]
    dit = randomized().to(dtype)
    add_adapters(dit, kind, **{"rank": 3, "alpha": 2.0, "targets": EVERYTHING, **own, **settings})
    start_adapters(dit, mesh, seed=4)
    if trained:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in dit.named_parameters():
                if name in adapter_state_dict(dit):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing(mesh: ProcessMesh, variant: str, dtype: torch.dtype) -> None:
    dit = adapted(mesh, variant, trained=False, dtype=dtype)
    assert torch.equal(dit(*inputs()), randomized().to(dtype)(*inputs()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_in_place_merged_from_a_file_and_added_from_a_file_compute_the_same(
    mesh: ProcessMesh, variant: str
) -> None:
    dit = adapted(mesh, variant, trained=True).eval()
    state = {key: value.clone() for key, value in dit.state_dict().items()}
    expected, plain = dit(*inputs()), randomized()(*inputs())
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max(), "these adapters must matter"
    merge_adapters(dit)
    tolerance = 2e-5 * expected.abs().max().item()  # fp32, sums in another order, through two blocks
    assert torch.allclose(dit(*inputs()), expected, atol=tolerance)

    weights = from_tensors(state, where="run")
    updates, base = updates_of(weights), without_adapters(weights)
    assert updates.keys() == {name for name, _ in adapted_layers(dit)}
    merged = merge_updates(base, updates)
    for name, layer in adapted_layers(dit):
        torch.testing.assert_close(merged[f"{name}.weight"], layer.weight, rtol=1e-4, atol=1e-5)
    bare = randomized()
    add_adapters_for(bare, updates)
    assert torch.allclose(bare.eval()(*inputs()), expected, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_tensor_has_a_gradient_by_the_second_step(mesh: ProcessMesh, variant: str) -> None:
    dit = adapted(mesh, variant, trained=False)
    own = {name: p for name, p in dit.named_parameters() if name in adapter_state_dict(dit)}
    assert {p.dtype for p in own.values()} == {torch.float32}
    optimizer = torch.optim.SGD(own.values(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        dit(*inputs()).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in own.values())


def test_patterns_set_rank_and_scale_of_single_layers_and_are_saved(mesh: ProcessMesh) -> None:
    dit = adapted(mesh, "rslora", trained=True)
    found = {name: (layer.adapter.rank, layer.adapter.scale) for name, layer in adapted_layers(dit)}
    block = "transformer.layers.1"
    assert found[f"{block}.mlp.dense_h_to_4h"] == (3, 2 / 3**0.5)
    assert found[f"{block}.attention.dense"] == (5, 2 / 5**0.5)
    assert found[f"{block}.attention.query_key_value"] == (2, 7 / 2**0.5)
    updates = updates_of(from_tensors(dit.state_dict(), where="run"))
    for name, parts in updates.items():
        assert [part.scale for part in parts] == pytest.approx([found[name][1]] * len(parts), rel=1e-6)


class Linears(nn.Module):
    """The linear layers of one attention, apart, as PEFT adapts them."""

    def __init__(self, qkv: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        for name, weight, bias in [
            *zip(("to_q", "to_k", "to_v"), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True),
            ("dense", dense.weight, dense.bias),
        ]:
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1), self.dense(x)


PEFT = {
    "lora": ("Lora", {}, {}),
    "rslora": ("Lora", {"use_rslora": True}, {"use_rslora": True}),
    "dora": ("Dora", {}, {"use_dora": True}),
    "dora_rslora": ("Dora", {"use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "pissa": ("Pissa", {}, {}),
}


@pytest.mark.parametrize("variant", PEFT)
def test_outputs_and_gradients_are_those_of_peft(mesh: ProcessMesh, variant: str) -> None:
    kind, ours, theirs = PEFT[variant]
    dit = randomized()
    pattern = {"rank_pattern": {"dense": 5}, "alpha_pattern": {"dense": 3.0}}
    add_adapters(dit, kind, rank=4, alpha=8.0, **ours, **pattern)
    attention = "transformer.layers.0.attention"
    layers = {name: dit.get_submodule(f"{attention}.{name}") for name in ("query_key_value", "dense")}
    peft = Linears(*layers.values())
    inject_adapter_in_model(
        LoraConfig(
            r=4, lora_alpha=8.0, target_modules=["to_q", "to_k", "to_v", "dense"], **theirs, **pattern
        ),
        peft,
    )
    start_adapters(dit, mesh, seed=1)
    pairs = list(pairs_of(layers, peft))
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(2))
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = [layer(ours_x) for layer in layers.values()]
    for output, expected in zip(outputs, peft(theirs_x), strict=True):
        assert torch.allclose(output, expected, atol=1e-5 * expected.abs().max().item())
    for y in (outputs, peft(theirs_x)):
        sum(each.square().mean() for each in y).backward()
    for gradient, expected in [(ours_x.grad, theirs_x.grad), *((a.grad, b.grad) for a, b in pairs)]:
        assert expected.any()
        assert torch.allclose(gradient, expected, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def pairs_of(layers: dict[str, nn.Module], peft: Linears):
    """Gives all adapters the same noise, and yields ours and theirs, tensor by tensor."""
    generator = torch.Generator().manual_seed(3)
    places = [("query_key_value", i, name) for i, name in enumerate(("to_q", "to_k", "to_v"))] + [
        ("dense", 0, "dense")
    ]
    for layer, index, name in places:
        adapter, linear = layers[layer].adapter, peft.get_submodule(name)
        a, b = linear.lora_A.default.weight, linear.lora_B.default.weight
        sides = ("shift_A", "shift_B") if hasattr(adapter, "shift_A") else ("matrix_A", "matrix_B")
        own_a, own_b = (getattr(getattr(adapter, side), str(index)) for side in sides)
        for own in (own_a, own_b):
            own.add_(0.3 * torch.randn(own.shape, generator=generator))
        a.copy_(own_a)
        b.copy_(own_b)
        if sides[0] == "shift_A":
            a0, b0 = (getattr(getattr(adapter, f"principal_{side}"), str(index)) for side in "AB")
            a.add_(a0)
            b.add_(b0)
            linear.base_layer.weight.sub_(adapter.scale * b0 @ a0)
        if hasattr(adapter, "magnitude"):
            own_m, m = getattr(adapter.magnitude, str(index)), linear.lora_magnitude_vector.default.weight
            own_m.add_(0.3 * torch.randn(own_m.shape, generator=generator))
            m.copy_(linear.base_layer.weight.norm(dim=1) + own_m)
            yield own_m, m
        yield own_a, a
        yield own_b, b


def test_pissa_starts_at_the_principal_components_of_the_weight(mesh: ProcessMesh) -> None:
    dit = adapted(mesh, "pissa", trained=False)
    for name, layer in adapted_layers(dit):
        adapter = layer.adapter
        for index, rows in enumerate(layer.weight.chunk(adapter.layer.parts)):
            a0, b0 = (getattr(getattr(adapter, f"principal_{side}"), str(index)) for side in "AB")
            best = torch.linalg.svdvals(rows.double())[adapter.rank :].square().sum().sqrt()
            left = (rows.double() - adapter.scale * b0.double() @ a0.double()).norm()
            assert left <= 1.001 * best, name  # Eckart and Young: no product of this rank leaves less
            torch.testing.assert_close(a0.norm(dim=1), b0.norm(dim=0))


def test_pissa_needs_as_many_singular_values_as_its_rank(mesh: ProcessMesh) -> None:
    with pytest.raises(
        ConfigError, match=r"params\.r = 20: expected at most 16, the singular values of time_embed"
    ):
        adapted(mesh, "pissa", trained=False, rank=20, targets=("time_embed",))
    add = {"rank_pattern": {"time_embed": 16}, "rank": 20}
    adapted(mesh, "pissa", trained=False, targets=("time_embed", r"attention\.dense"), **add)


def test_a_file_continues_in_every_variant_or_is_refused_by_name(mesh: ProcessMesh) -> None:
    files = {
        variant: updates_of(from_tensors(adapted(mesh, variant, trained=True).state_dict(), where=variant))
        for variant in ("rslora", "dora", "pissa")
    }
    for begun, given in [("rslora", "pissa"), ("dora", "rslora"), ("dora", "dora"), ("dora", "pissa")]:
        dit = adapted(mesh, begun, trained=False, rank=12, rank_pattern=[])
        load_updates(dit, files[given])
        expected = adapted(mesh, given, trained=True)(*inputs())
        assert torch.allclose(dit(*inputs()), expected, atol=2e-5 * expected.abs().max().item()), (
            begun,
            given,
        )
    with pytest.raises(CheckpointError, match=r"has a DoRA update, and its adapter here is no Dora"):
        load_updates(adapted(mesh, "rslora", trained=False, rank=12), files["dora"])
    with pytest.raises(CheckpointError, match=r"has a Pissa adapter, which cannot start from a LoRA file"):
        load_updates(adapted(mesh, "pissa", trained=False), files["rslora"])


def some_updates(seed: int, *ranks: int) -> dict[str, tuple[LowRank, ...]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"transformer.layers.0.attention.dense": 24, "transformer.layers.1.attention.dense": 16}
    return {
        name: (
            LowRank(
                torch.randn(rank, 20, generator=generator), torch.randn(rows, rank, generator=generator), 0.5
            ),
        )
        for (name, rows), rank in zip(sizes.items(), ranks, strict=True)
    }


def test_a_sum_is_exact_and_its_truncation_the_nearest_of_that_rank() -> None:
    first, second = some_updates(1, 3, 4), some_updates(2, 5, 2)
    total = stacked(strengthened(first, 0.7), strengthened(second, -1.5))
    low = truncated(total, 4)
    for name, (part,) in total.items():
        expected = 0.7 * first[name][0].delta(torch.float64) - 1.5 * second[name][0].delta(torch.float64)
        torch.testing.assert_close(part.delta(torch.float64), expected, rtol=1e-5, atol=1e-6)
        left = torch.linalg.svdvals(expected)[4:].square().sum().sqrt()
        nearest = low[name][0]
        assert (part.rank, nearest.rank) == (sum(u[name][0].rank for u in (first, second)), 4)
        assert (expected - nearest.delta(torch.float64)).norm() == pytest.approx(left.item(), rel=1e-4)
    assert truncated(total, 8) == total, "a rank that is high enough leaves them as they are"


def test_dora_adapters_have_neither_sums_nor_other_strengths_nor_lower_ranks(mesh: ProcessMesh) -> None:
    dora = updates_of(from_tensors(adapted(mesh, "dora", trained=True).state_dict(), where="dora"))
    assert strengthened(dora, 1.0) == dora == stacked({}, dora) == stacked(dora, {})
    for change, says in [
        (lambda: strengthened(dora, 0.5), r"strength 0\.5 is not defined for DoRA"),
        (lambda: stacked(dora, some_updates(1, 2, 2)), "a sum with other adapters is not defined for DoRA"),
        (lambda: stacked(some_updates(1, 2, 2), dora), "a sum with other adapters is not defined for DoRA"),
        (lambda: truncated(dora, 2), "rank 2 is not defined for DoRA"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            change()


def test_the_kinds_are_parts_of_one_slot() -> None:
    assert {"Dora", "Lora", "Pissa"} <= AdapterConfig.records().keys()
