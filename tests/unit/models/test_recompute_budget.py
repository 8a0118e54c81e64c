"""Laws of `args.checkpoint_budget`: what is kept stays within it, and nothing cheaper would."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sat_train.config import ModelSpec
from sat_train.models.build import build_dit
from sat_train.models.dit.recompute import POLICIES
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.meters import FlopMeter, LivingTensors, flash_attention
from sat_train.models.recompute_budget import (
    BlockCost,
    count_block_costs,
    count_compiled_blocks,
    policies_within,
)
from tests.networks import add_adapters
from tests.unit.models.test_build import load
from tests.unit.models.test_control_branch import CONTROL, branch
from tests.unit.models.test_stack import inputs

ROW = 2 * 20 * 128 * 2  # bytes of the tokens: samples, tokens, width, bfloat16
BUDGETS = [0, 0.1, 0.4, 0.9, 1]


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    tiny = load("model/cogvideox_tiny").spec
    return dataclasses.replace(tiny, layers=3, condition_widths={"control": CONTROL})


def models(spec: ModelSpec) -> Iterator[tuple[DiffusionTransformer, dict[str, Any]]]:
    """Yields models whose blocks differ: all weights, and a narrow branch next to adapters."""
    plain = dataclasses.replace(spec, modules={})
    for kind in ("all", "branch"):
        dit = build_dit(plain, device="meta", dtype=torch.bfloat16)
        latent, timesteps, text = (each.to("meta") for each in inputs(spec))
        given = {"latent_btchw": latent, "timesteps_b": timesteps, "text_bld": text}
        if kind != "all":
            dit.requires_grad_(False)
            add_adapters(dit, rank=2)
            with torch.device("meta"):
                dit.add_mixin("control", branch(spec, blocks=2, heads=1).to("meta", torch.bfloat16))
            given["extras"] = {"control": torch.empty(2, 2, CONTROL, 4, 6, device="meta")}
        yield dit, given


def measured(
    dit: DiffusionTransformer, given: Mapping[str, Any], policies: Mapping[str, Any]
) -> tuple[int, int]:
    """Returns the bytes that live between forward and backward of the whole model, and the FLOPs of both."""
    for name, policy in policies.items():
        dit.get_submodule(name).recompute = policy
    with flash_attention(), FlopMeter() as flops, LivingTensors(dit) as living:
        out = dit(**given)
        kept = living.now
        out.backward(torch.empty_like(out))
    return kept, flops.total


def test_what_is_kept_stays_within_the_budget_and_more_of_it_computes_less_again(spec: ModelSpec) -> None:
    for dit, given in models(spec):
        costs = count_block_costs(dit, given, inputs_on_host=False)
        assert len(costs) == len(dit.blocks) + 2 * ("control" in dit.mixins)
        beyond = sum(own[0].kept - own[-1].kept for own in costs.values())
        most, fewest = measured(dit, given, dict.fromkeys(costs, "off"))
        least, all_again = measured(dit, given, dict.fromkeys(costs, "full"))
        assert beyond == pytest.approx(most - least, abs=ROW)
        flops = []
        for budget in BUDGETS:
            policies = policies_within(costs, budget)
            kept, again = measured(dit, given, policies)
            # what is kept of the first block's input, and of a branch's states, depends on their neighbours
            assert kept <= least + budget * (most - least) + ROW
            flops.append(again)
        assert flops == sorted(flops, reverse=True)
        assert fewest == flops[-1] < flops[0] <= all_again
        assert len(set(flops)) > 3


def test_no_other_choice_within_the_budget_computes_less_again() -> None:
    rows = [(20, 0, 0, 0), (11, 0, 0, 54), (2, 40, 0, 54), (1, 40, 39, 54)]
    trained = tuple(BlockCost(*each) for each in rows)
    rows = [(13, 0, 0, 0), (15, 0, 0, 74), (2, 41, 0, 74), (1, 41, 39, 74)]
    frozen = tuple(BlockCost(*each) for each in rows)
    costs = {"a": frozen, "b": trained, "c": trained, "d": frozen, "e": trained}
    off, full = (sum(own[at].kept for own in costs.values()) for at in (0, -1))

    def total(taken: Mapping[str, Any]) -> tuple[int, ...]:
        chosen = [costs[name][POLICIES.index(policy)] for name, policy in taken.items()]
        kept, linear, attention, moved, _ = (sum(column) for column in zip(*chosen, strict=True))
        return kept, linear + attention, moved

    choices = itertools.product(POLICIES, repeat=len(costs))
    everything = [total(dict(zip(costs, each, strict=True))) for each in choices]
    for budget in (each / 20 for each in range(21)):
        allowed = full + budget * (off - full)
        kept, *again = total(policies_within(costs, budget))
        assert kept <= allowed
        assert again == list(min(each[1:] for each in everything if each[0] <= allowed))


def test_inputs_in_host_memory_are_not_kept(spec: ModelSpec) -> None:
    dit, given = next(models(spec))
    here, there = (count_block_costs(dit, given, inputs_on_host=on_host) for on_host in (False, True))
    for own, other in zip(here.values(), there.values(), strict=True):
        assert own[0] == other[0]
        less = {mine.kept - left.kept for mine, left in zip(own[1:], other[1:], strict=True)}
        assert less == {own[-1].kept}


def test_what_is_counted_of_a_compiled_block_is_what_it_saves(spec: ModelSpec) -> None:
    torch._dynamo.reset()
    dit = build_dit(dataclasses.replace(spec, modules={}), device="cpu", dtype=torch.bfloat16)
    given = dict(zip(("latent_btchw", "timesteps_b", "text_bld"), inputs(spec), strict=True))
    on_meta = {name: each.to("meta") for name, each in given.items()}
    twin = copy.deepcopy(dit).to("meta")
    counted = list(count_compiled_blocks(twin, on_meta).values())
    eager = [own[0].kept for own in count_block_costs(twin, on_meta).values()]
    dit.compile_blocks(backend="aot_eager_decomp_partition")
    saving = Saving(dit._run)
    dit._run = saving
    dit(**given).float().square().mean().backward()
    assert saving.saved == pytest.approx(counted, rel=0.05)
    assert all(less < 0.75 * more for less, more in zip(counted, eager, strict=True))


class Saving:
    """Runs blocks and notes the bytes that each saves, without weights."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self.run = run
        self.saved: list[int] = []

    def __call__(self, *args: Any, **policy: Any) -> Tensor:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.run(*args, **policy)
        self.saved.append(sum(kept.values()))
        return out
