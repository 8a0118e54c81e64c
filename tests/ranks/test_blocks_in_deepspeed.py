"""The transformer in DeepSpeed's engine: every ZeRO stage computes the same, compiled blocks never break."""

from __future__ import annotations

import pytest
import torch

from sat_train.distributed.processes import ProcessMesh
from sat_train.models.adapter import adapter_state_dict, start_adapters
from sat_train.models.trainable import select_trainable
from tests.networks import add_adapters, norms_as_on_a_gpu
from tests.unit.models.mixins import Branch, Fuser, Head
from tests.unit.models.narrow import inputs, randomized

pytestmark = pytest.mark.ranks


def _train(
    mesh: ProcessMesh, stage: int, added: str, compiled: bool, recompute: str = "full"
) -> tuple[list[float], dict, int]:
    """Returns the losses of three steps, the graph breaks and the number of graphs."""
    from torch._dynamo.utils import counters

    from sat_train.engine.build import start_engine

    torch._dynamo.reset()
    counters.clear()
    # ZeRO-3 gathers every weight where a module computes: the learned table and the adapters among them
    dit = randomized(positions="rotary_learned", recompute=recompute)
    if added == "modules":
        for name, mixin in {"control": Branch(0, 1), "motion": Fuser(1), "head": Head()}.items():
            dit.add_mixin(name, mixin)
    if added in ("Lora", "Dora", "Pissa"):
        add_adapters(dit, added, rank=2, targets=(r"attention\.", r"mlp\."))
        start_adapters(dit, mesh, seed=0)
        with torch.no_grad():
            for key, matrix in adapter_state_dict(dit).items():
                if "matrix_B" in key:
                    matrix.fill_(0.1)
    select_trainable(dit, not_trainable_prefixes=["all"] if added in ("Lora", "Dora", "Pissa") else [])
    if compiled:
        dit.compile_blocks(backend="aot_eager")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = start_engine(dit, lambda tensors: torch.optim.SGD(tensors.values(), lr=0.01), config, mesh)
    losses = []
    for _ in range(3):
        v, outputs = engine(*inputs(), return_outputs=True)
        loss = sum((output.square().mean() for output in outputs.values()), v.square().mean())
        engine.backward(loss)
        engine.step(0.01)
        losses.append(loss.item())
    return losses, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("added", ["base", "Lora", "Dora", "Pissa", "modules"])
def test_every_stage_and_compiled_blocks_give_the_same_losses(rank_pool, added):
    expected, _, _ = rank_pool(1)(_train, 1, added, False)[0]
    assert expected[2] < expected[1] < expected[0]
    # what each has of its own: stage 2 divides gradients, and asks no block who made them
    others = {"base": ((1, True), (2, True), (3, False)), "Pissa": ((3, False),)}
    for stage, compiled in others.get(added, ((1, True), (3, False))):
        losses, breaks, graphs = rank_pool(1)(_train, stage, added, compiled)[0]
        assert losses == pytest.approx(expected, rel=1e-5), (stage, compiled)  # fp32, sums in another order
        assert not breaks
        # with frozen weights the first block's input needs no gradient, which is a graph of its own; with
        # modules the blocks differ in who acts there
        assert graphs == (0 if not compiled else 1 if added == "base" else 2)


def _train_like_a_gpu(mesh: ProcessMesh, added: str) -> tuple[list[float], dict, int]:
    with norms_as_on_a_gpu():
        return _train(mesh, 3, added, False, "off")


@pytest.mark.parametrize("added", ["base", "Lora"])
def test_zero_3_computes_norms_again_as_they_were(rank_pool, added):
    plain = rank_pool(1)(_train, 3, added, False, "off")[0][0]
    assert rank_pool(1)(_train_like_a_gpu, added)[0][0] == plain


@pytest.mark.parametrize("recompute", ["gemm", "attention"])
def test_zero_3_leaves_products_alone_that_a_block_keeps_for_its_backward(rank_pool, recompute):
    losses = {policy: rank_pool(1)(_train, 3, "base", False, policy)[0][0] for policy in ("off", recompute)}
    assert losses[recompute] == losses["off"]
