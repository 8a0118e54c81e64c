"""Two ranks that share one transformer compute what one rank alone does: outputs, gradients, adapters."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sat_train.distributed.processes import ProcessMesh, start_single_process
from sat_train.errors import CheckpointError, ConfigError
from sat_train.models.adapter import adapted_layers, merge_adapters, start_adapters
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.sharding import merge_shards, shard_weight, tensor_parallel_layout
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.recompute_budget import count_block_costs, policies_within
from tests.networks import add_adapters, build_network, norms_as_on_a_gpu
from tests.unit.models.mixins import Branch, Fuser, Remembering
from tests.unit.models.narrow import inputs

TARGETS = (r"attention\.", r"mlp\.", r"adaLN_modulations\.")

# fp32 sums cut in two halves; gradients pass through two blocks
TOLERANCE = 2e-5


def _noise(key: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return 0.2 * torch.randn(shape, generator=generator)


ADAPTERS = {"lora": "Lora", "dora": "Dora", "pissa": "Pissa"}


def _noise_of(dit: torch.nn.Module) -> dict[str, Tensor]:
    """Whole weights for a model on one rank."""
    return {key: _noise(key, parameter.shape) for key, parameter in dit.named_parameters()}


def _build(positions: str, added: str) -> DiffusionTransformer:
    dit = build_network(positions=positions)
    if added in ADAPTERS:
        rank_pattern = [["mlp", 2], ["attention.dense", 4]]
        add_adapters(dit, ADAPTERS[added], rank=3, rank_pattern=rank_pattern, targets=TARGETS)
    if added == "modules":
        for name, mixin in {"control": Branch(0, 1), "motion": Fuser(0), "reference": Remembering(1)}.items():
            dit.add_mixin(name, mixin)
    return dit


def _run(
    weights: dict[str, Tensor] | None, mesh: ProcessMesh, positions: str, added: str
) -> tuple[Tensor, dict, Tensor | None]:
    """Returns the output and this rank's gradients; `weights` are whole, None takes fresh ones."""
    dit = _build(positions, added)
    if weights is not None:
        with torch.no_grad():
            for key, parameter in dit.named_parameters():
                parameter.copy_(shard_weight(key, weights[key], rank=mesh.model_rank, size=mesh.model_size))
    start_adapters(dit, mesh, seed=0)
    output = dit(*inputs())
    output.square().mean().backward()
    marked = {key for key, parameter in dit.named_parameters() if getattr(parameter, "model_parallel", False)}
    assert marked == {key for key, _ in dit.named_parameters() if tensor_parallel_layout(key)}
    merged = None
    if added in ADAPTERS:
        merge_adapters(dit.eval())
        merged = dit(*inputs()).detach()
    gradients = {key: parameter.grad for key, parameter in dit.named_parameters()}
    return output.detach(), gradients, merged


def _on_rank(mesh: ProcessMesh, weights: dict[str, Tensor], positions: str, added: str):
    with norms_as_on_a_gpu():
        return _run(weights, mesh, positions, added)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("positions", "added"),
    [
        *itertools.product(("sincos", "rotary_learned"), ("base", "lora", "modules")),
        *itertools.product(("sincos",), ("dora", "pissa")),
    ],
)
def test_two_ranks_compute_what_one_does(rank_pool, positions, added):
    mesh = start_single_process()
    weights = _noise_of(_build(positions, added))
    expected, gradients, merged = _run(weights, mesh, positions, added)
    results = rank_pool(2)(_on_rank, weights, positions, added, model_parallel_size=2)
    for output, _, merged_here in results:
        assert torch.allclose(output, expected, atol=TOLERANCE * expected.abs().max())
        if added in ADAPTERS:
            assert torch.allclose(merged_here, merged, atol=TOLERANCE * merged.abs().max())
    # without rotation a bias of all keys has no effect: its gradient is zero, noise in fp32
    floor = 1e-3 * max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        slices = [result[1][key] for result in results]
        if tensor_parallel_layout(key) is None:
            assert torch.equal(*slices), f"{key} differs between the ranks and would drift apart"
        actual = merge_shards(key, slices)
        assert (actual - gradient).abs().max() < TOLERANCE * gradient.abs().max().clamp(min=floor), key


def _compiled_as_eager(mesh: ProcessMesh) -> dict[str, str]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    given = dict(zip(("latent_btchw", "timesteps_b", "text_bld"), inputs(), strict=True))
    twin = _build("rotary_learned", "lora").to("meta")
    costs = count_block_costs(
        twin, {name: each.to("meta") for name, each in given.items()}, inputs_on_host=False
    )
    outputs, gradients = [], []
    for policies, compiled in (
        (("off", "off"), False),
        (("attention", "gemm"), False),
        (("attention", "gemm"), True),
    ):
        dit = _build("rotary_learned", "lora")
        for name, policy in zip(costs, policies, strict=True):
            dit.get_submodule(name).recompute = policy
        start_adapters(dit, mesh, seed=0)
        with torch.no_grad():
            for key, parameter in dit.named_parameters():
                parameter.add_(_noise(key, parameter.shape))
        if compiled:
            dit.compile_blocks(backend="aot_eager")
        outputs.append(dit(*inputs()))
        outputs[-1].square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in dit.named_parameters()})
    assert not counters["graph_break"]
    first, eager, compiled = gradients
    assert all(torch.equal(eager[key], gradient) for key, gradient in first.items()), "a sum is added twice"
    assert torch.allclose(*outputs[1:], rtol=TOLERANCE, atol=TOLERANCE * outputs[0].abs().max().item())
    for key, gradient in first.items():
        assert (compiled[key] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), key
    return policies_within(costs, 0.5)


@pytest.mark.ranks
def test_compiled_blocks_of_two_ranks_compute_what_eager_ones_do(rank_pool):
    policies, same = rank_pool(2)(_compiled_as_eager, model_parallel_size=2)
    assert policies == same
    assert set(policies.values()) == {"full", "off"}


class _OwnHeads(Mixin):
    """Has weights that each rank's heads use: every rank would have a part of their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Linear(32, 32)

    def attention_fn(self, query, key, value, *, part, block, context, old_impl):
        return self.scale(old_impl(query, key, value, block=block, context=context))


class _OwnHeadsSharded(_OwnHeads):
    tensor_parallel = "sharded"


def _add_own_heads(mesh: ProcessMesh) -> None:
    with pytest.raises(ConfigError, match=r"own_heads.*does not work under tensor parallelism"):
        build_network().add_mixin("own_heads", _OwnHeads())
    build_network().add_mixin("own_heads", _OwnHeadsSharded())


@pytest.mark.ranks
def test_replicated_weights_inside_attention_are_refused_under_tensor_parallelism(rank_pool):
    rank_pool(2)(_add_own_heads, model_parallel_size=2)


def _initial(mesh: ProcessMesh) -> dict[str, Tensor]:
    dit = build_network(init_seed=11)
    add_adapters(dit, rank=3, targets=TARGETS, seed=11)
    assert len(list(adapted_layers(dit))) == 10
    return {key: parameter.detach() for key, parameter in dit.named_parameters()}


@pytest.mark.ranks
def test_initial_weights_do_not_depend_on_the_number_of_ranks(rank_pool):
    expected = _initial(start_single_process())
    first, second = rank_pool(2)(_initial, model_parallel_size=2)
    for key, weight in expected.items():
        assert torch.equal(merge_shards(key, [first[key], second[key]]), weight), key


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_merge_to_the_whole(size):
    whole = {key: torch.randn(parameter.shape) for key, parameter in _adapted().named_parameters()}
    for key, tensor in whole.items():
        slices = [shard_weight(f"module.{key}", tensor, rank=rank, size=size) for rank in range(size)]
        assert torch.equal(merge_shards(f"module.{key}", slices), tensor), key


def test_a_slice_of_the_fused_weight_has_its_heads_of_q_and_k_and_v():
    rows = torch.arange(12.0)[:, None]
    key = "transformer.layers.0.attention.query_key_value.weight"
    assert shard_weight(key, rows, rank=1, size=2).flatten().tolist() == [2, 3, 6, 7, 10, 11]


def test_a_weight_that_cannot_be_cut_is_an_error():
    key = "transformer.layers.0.attention.query_key_value.weight"
    with pytest.raises(CheckpointError, match=r"\(12, 1\) cannot be sharded for model_parallel_size = 8"):
        shard_weight(key, torch.zeros(12, 1), rank=0, size=8)


def _adapted():
    start_single_process()
    dit = build_network(layers=1)
    add_adapters(dit, rank=4, targets=TARGETS)
    return dit
