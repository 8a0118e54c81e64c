"""Config -> what each block recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sat.model.transformer import BaseTransformerLayer
from sat.mpu import get_model_parallel_world_size

from sat_train.config import RunConfig
from sat_train.config.parts.record import Recompute
from sat_train.models.dit.recompute import POLICIES
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.meta_models import build_meta_dit, build_meta_inputs, counting_key
from sat_train.models.recompute_budget import (
    BlockCost,
    BlockCosts,
    count_block_costs,
    count_compiled_blocks,
    policies_within,
)

# by what they depend on; a plan asks several times
_COUNTED: dict[tuple[object, ...], dict[str, Any]] = {}


def set_recomputation(dit: DiffusionTransformer, config: RunConfig, *, compiled: bool = False) -> None:
    """Sets the policies of blocks that differ from `args.checkpoint_activations`.

    Args:
        dit: The transformer with its modules; what trains has been selected.
        config: The configuration.
        compiled: Blocks are compiled; a budget is then one of what they keep.

    Ranks: any; all choose the same, from the same counts.
    """
    layers = _layers(dit)
    if config.args.checkpoint_budget is not None:
        dit.recompute = "full"  # modules that cannot be counted
        policies = policies_within(_costs(config, len(dit.blocks), compiled), config.args.checkpoint_budget)
    else:
        policies = _left_out(config, layers)
    for name, policy in policies.items():
        layers[name].recompute = policy


def blocks_differ(config: RunConfig) -> bool:
    """Returns whether one block recomputes another part than the next."""
    return config.args.checkpoint_every > 1 or config.args.checkpoint_budget is not None


def without_recomputation(config: RunConfig) -> RunConfig:
    """Returns a configuration whose backward pass computes nothing again."""
    return keeping(config, 1)


def keeping(config: RunConfig, share: float) -> RunConfig:
    """Returns a configuration that keeps a share of activations: 0 is `full`, 1 is `off`."""
    changes = {
        "checkpoint_activations": "off" if share == 1 else "full",
        "checkpoint_every": 1,
        "checkpoint_budget": share if 0 < share < 1 else None,
        "checkpoint_offload": config.args.checkpoint_offload and share < 1,
    }
    return replace(config, args=config.args.model_copy(update=changes))


def chosen_costs(config: RunConfig, *, compiled: bool = False) -> list[BlockCost]:
    """Returns the cost of the policy that each block has."""
    costs = _costs(config, config.spec.layers, compiled)
    pairs = zip(costs.values(), _chosen(config, costs), strict=True)
    return [own[POLICIES.index(policy)] for own, policy in pairs]


def saved_by_compiling(config: RunConfig) -> list[int]:
    """Returns the bytes that each block keeps less of where it is compiled; only `off` keeps less."""
    if not blocks_differ(config) and config.args.recomputes:
        return []
    costs, eager = (_costs(config, config.spec.layers, compiled) for compiled in (True, False))
    policies = _chosen(config, costs)
    pairs = zip(costs, policies, strict=True)
    return [eager[name][0].kept - costs[name][0].kept for name, policy in pairs if policy == "off"]


def _chosen(config: RunConfig, costs: Mapping[str, BlockCosts]) -> list[Recompute]:
    """Returns the policy of each block."""
    budget, default = config.args.checkpoint_budget, config.args.recompute
    policies = _left_out(config, costs) if budget is None else policies_within(costs, budget)
    return [policies.get(name, default) for name in costs]


def recomputed_widths(config: RunConfig) -> list[int]:
    """Returns the widths of the blocks of a run that recompute something."""
    dit = build_meta_dit(config)
    set_recomputation(dit, config)
    policies = {each: getattr(each, "recompute", dit.recompute) for each in _layers(dit).values()}
    return [each.input_layernorm.normalized_shape[0] for each, policy in policies.items() if policy != "off"]


def _left_out(config: RunConfig, names: Iterable[str]) -> dict[str, Recompute]:
    """Returns `off` for the blocks that `args.checkpoint_every` leaves out, by names of their layers."""
    return {name: "off" for name in names if int(name.rpartition(".")[2]) % config.args.checkpoint_every}


def _costs(config: RunConfig, num_blocks: int, compiled: bool) -> dict[str, BlockCosts]:
    """Counts blocks on samples of the largest size, in micro-batches of training."""
    on_host = config.args.checkpoint_offload
    count = partial(count_block_costs, inputs_on_host=on_host)
    costs: dict[str, BlockCosts] = _counted(config, num_blocks, count, "eager", on_host)
    if not compiled:
        return costs
    kept: dict[str, int] = _counted(config, num_blocks, count_compiled_blocks, "compiled")
    return {name: (own[0]._replace(kept=kept[name]), *own[1:]) for name, own in costs.items()}


def _counted(
    config: RunConfig, num_blocks: int, count: Callable[..., dict[str, Any]], *depends_on: object
) -> dict[str, Any]:
    args, ranks = config.args, get_model_parallel_world_size()
    settings = (args.batch_size, args.quantize_base, num_blocks, ranks)
    key = (*counting_key(config), *settings, *depends_on)
    if key not in _COUNTED:
        dit, inputs = build_meta_dit(config, layers=num_blocks), build_meta_inputs(config, args.batch_size)
        _COUNTED[key] = count(dit, inputs)
    return _COUNTED[key]


def _layers(dit: DiffusionTransformer) -> dict[str, BaseTransformerLayer]:
    """Returns SAT's layers of all blocks, of branches too, by name."""
    return {name: each for name, each in dit.named_modules() if isinstance(each, BaseTransformerLayer)}
