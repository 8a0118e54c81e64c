"""Chooses what each block recomputes, so that all of them keep at most a share of their activations.

The cost of each policy is counted on the meta device, block by block, eager or compiled. The choice is exact:
of all that the budget allows, the one that computes the fewest FLOPs again, and among those moves the fewest
bytes in elementwise operations.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sat_train.config.parts.record import Recompute
from sat_train.models.compiled_blocks import count_compiled_bytes
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.recompute import POLICIES, recomputing
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.meters import RunMeter, flash_attention, no_collectives

T = TypeVar("T")


class BlockCost(NamedTuple):
    """Memory and recomputation of a policy in one block.

    Args:
        kept: Bytes that live between forward and backward, its input included.
        linear: FLOPs of matrix products that are computed again.
        attention: FLOPs of attention that are computed again.
        moved: Bytes that elementwise operations read and write again.
        summed: Bytes that are summed over the ranks of a model again.
    """

    kept: int
    linear: int
    attention: int
    moved: int
    summed: int = 0

    def beyond(self, other: BlockCost) -> BlockCost:
        """Returns what this one takes beyond another, and all that it keeps."""
        again = (a - b for a, b in zip(self[1:], other[1:], strict=True))
        return BlockCost(self.kept, *again)


BlockCosts = tuple[BlockCost, ...]  # of each of POLICIES


def count_block_costs(
    dit: DiffusionTransformer, inputs: Mapping[str, Any], *, inputs_on_host: bool = False
) -> dict[str, BlockCosts]:
    """Counts the costs of all blocks in one forward, also of the blocks of branches.

    Args:
        dit: The model on the meta device.
        inputs: Of its forward.
        inputs_on_host: Recomputed blocks keep their input in host memory.

    Returns:
        By name of the block's layer, in the order in which blocks run.
    """
    return _count_blocks(dit, inputs, partial(_costs_of, dit, inputs_on_host))


def count_compiled_blocks(dit: DiffusionTransformer, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Counts the bytes that each block keeps where it is compiled and recomputes nothing.

    Where it recomputes, it keeps what an eager one does.

    Args:
        dit: The model on the meta device.
        inputs: Of its forward.

    Returns:
        By name of the block's layer, in the order in which blocks run.
    """
    return _count_blocks(dit, inputs, _compiled_bytes, _as_behind_another)


def _as_behind_another(block: DitBlock, x_bld: Tensor) -> Tensor:
    """Returns a block's input as it is behind another one.

    With adapters the first block's needs no gradient, so it keeps a little less; to trace it, too, would take
    seconds.
    """
    trains = any(each.requires_grad for module in _modules(block) for each in module.parameters(False))
    return x_bld.detach().requires_grad_(trains or x_bld.requires_grad)


def _count_blocks(
    dit: DiffusionTransformer,
    inputs: Mapping[str, Any],
    count: Callable[[DitBlock, Tensor, BlockContext], tuple[T, Tensor]],
    prepare: Callable[[DitBlock, Tensor], Tensor] = lambda block, x_bld: x_bld,
) -> dict[str, T]:
    """Returns counts of all blocks; of those that cost the same, one is counted, and its output is theirs."""
    names = {module: name for name, module in dit.named_modules()}
    counts: dict[str, T] = {}
    known: dict[str, tuple[T, Tensor]] = {}

    def counted(block: DitBlock, x_bld: Tensor, context: BlockContext, *, recompute: Recompute) -> Tensor:
        x_bld = prepare(block, x_bld)
        kind = _kind(block, x_bld, context)
        if kind not in known:
            known[kind] = count(block, x_bld, context)
        counts[names[block.layer]], y_bld = known[kind]
        return y_bld

    run, dit._run = dit._run, counted
    try:
        with flash_attention(), no_collectives():
            dit(**inputs)
    finally:
        dit._run = run
    return counts


def _kind(block: DitBlock, x_bld: Tensor, context: BlockContext) -> str:
    """Returns a text that is the same for blocks that cost the same."""
    own = [(type(each).__name__, _shapes(each.parameters(False))) for each in _modules(block)]
    extras = sorted((name, _shapes([value])) for name, value in context.extras.items())
    # a module without parts may read the index of its block
    whole = any(part is None for acting in block.acting.values() for _, part in acting)
    return repr((own, _shapes([x_bld, context.emb_bd]), extras, block.index if whole else None))


def _modules(block: DitBlock) -> Iterable[torch.nn.Module]:
    parts = [part for acting in block.acting.values() for _, part in acting if part is not None]
    return itertools.chain.from_iterable(each.modules() for each in (*block.modules().values(), *parts))


def _shapes(tensors: Iterable[Tensor]) -> list[tuple[object, ...]]:
    return [(tuple(each.shape), each.dtype, each.requires_grad) for each in tensors]


def _costs_of(
    dit: DiffusionTransformer, inputs_on_host: bool, block: DitBlock, x_bld: Tensor, context: BlockContext
) -> tuple[BlockCosts, Tensor]:
    """Returns the cost of each policy, and the output."""
    counts = [_cost_and_output(dit, block, x_bld, context, policy) for policy in POLICIES]
    (plain, y_bld), left = counts[0], x_bld.nbytes if inputs_on_host else 0
    others = [cost.beyond(plain) for cost, _ in counts[1:]]
    costs = [cost._replace(kept=cost.kept - left) for cost in others]
    return (plain.beyond(plain), *costs), _leaf(y_bld)


def _compiled_bytes(block: DitBlock, x_bld: Tensor, context: BlockContext) -> tuple[int, Tensor]:
    x_bld, context = _leaf(x_bld), _with_leaves(context)
    return count_compiled_bytes(block, x_bld, context), _leaf(block(x_bld, context))


def _cost_and_output(
    dit: DiffusionTransformer, block: DitBlock, x_bld: Tensor, context: BlockContext, policy: Recompute
) -> tuple[BlockCost, Tensor]:
    x_bld, context = _leaf(x_bld), _with_leaves(context)
    shared = [x_bld, context.emb_bd, *context.extras.values()]
    shared += [context.rotation_lk2] if context.rotation_lk2 is not None else []
    meter = RunMeter(dit, *shared)
    with meter:
        y_bld = recomputing(block, x_bld.clone(), context, recompute=policy)
        kept = meter.living.now - y_bld.nbytes  # the next block keeps it, or nobody does
        if y_bld.requires_grad:
            y_bld.backward(torch.empty_like(y_bld))
    for parameter in dit.parameters():
        parameter.grad = None
    flops, traffic = meter.flops, meter.traffic
    return BlockCost(kept, flops.linear, flops.attention, traffic.moved, traffic.summed), y_bld


def _with_leaves(context: BlockContext) -> BlockContext:
    extras = {name: _leaf(value) for name, value in context.extras.items()}
    return context._replace(emb_bd=_leaf(context.emb_bd), extras=MappingProxyType(extras))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def policies_within(costs: Mapping[str, BlockCosts], budget: float) -> dict[str, Recompute]:
    """Returns the policy of each block, by the name of its layer.

    Blocks of a kind that keep more come last: they are freed first in the backward, before blocks that
    recompute more need memory for it.

    Args:
        costs: From `count_block_costs`.
        budget: Share of what `off` keeps beyond `full` that may be kept, 0 to 1.
    """
    off, full = (sum(own[at].kept for own in costs.values()) for at in (0, -1))
    kinds: dict[BlockCosts, list[str]] = defaultdict(list)
    for name, own in costs.items():
        kinds[own].append(name)
    counts = _cheapest([(own, len(names)) for own, names in kinds.items()], full + int(budget * (off - full)))
    policies: dict[str, Recompute] = {}
    for kind, (own, names) in enumerate(kinds.items()):
        by_kept = sorted(range(len(POLICIES)), key=lambda at: own[at].kept)
        chosen = [POLICIES[at] for at in by_kept for _ in range(counts[kind, at])]
        policies |= dict(zip(names, chosen, strict=True))
    return policies


class _Choice(NamedTuple):
    kept: int
    flops: int
    moved: int
    taken: tuple[Any, ...] = ()  # (kind, policy) of the last block, and the choice without it

    def with_block(self, cost: BlockCost, policy: tuple[int, int]) -> _Choice:
        flops = self.flops + cost.linear + cost.attention
        return _Choice(self.kept + cost.kept, flops, self.moved + cost.moved, (policy, self))

    def counts(self) -> Counter[tuple[int, int]]:
        """Returns the blocks of each kind and policy."""
        counts: Counter[tuple[int, int]] = Counter()
        while self.taken:
            last, self = self.taken
            counts[last] += 1
        return counts


def _cheapest(kinds: Sequence[tuple[BlockCosts, int]], allowed: int) -> Counter[tuple[int, int]]:
    """Returns the blocks of each kind and policy that compute least again, and keep what is allowed."""
    least = [min(cost.kept for cost in own) for own, _ in kinds]
    left = sum(kept * count for kept, (_, count) in zip(least, kinds, strict=True))  # by the blocks to come
    choices = [_Choice(0, 0, 0)]
    for kind, (own, count) in enumerate(kinds):
        for _ in range(count):
            left -= least[kind]
            more = (each.with_block(cost, (kind, at)) for each in choices for at, cost in enumerate(own))
            choices = _undominated(each for each in more if each.kept + left <= allowed)
    return choices[-1].counts()


def _undominated(choices: Iterable[_Choice]) -> list[_Choice]:
    """Returns the choices than which none keeps less and computes no more again; the cheapest is the last."""
    best: list[_Choice] = []
    for each in sorted(choices, key=lambda each: each[:3]):
        if not best or each[1:3] < best[-1][1:3]:
            best.append(each)
    return best
