"""Config -> what each block recomputes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sat.model.transformer import BaseTransformerLayer

from sat_train.config import RunConfig
from sat_train.config.parts.record import Recompute
from sat_train.models.dit.recompute import POLICIES
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.meta_models import build_meta_dit, build_meta_inputs
from sat_train.models.recompute_budget import BlockCost, BlockCosts, count_block_costs, policies_within


def set_recomputation(dit: DiffusionTransformer, config: RunConfig) -> None:
    """Sets the policies of blocks that differ from `args.checkpoint_activations`.

    Args:
        dit: The transformer with its modules; what trains has been selected.
        config: The configuration.

    Ranks: any; all choose the same, from the same counts.
    """
    layers = _layers(dit)
    if config.args.checkpoint_budget is not None:
        dit.recompute = "full"  # modules that cannot be counted
        policies = policies_within(_costs(config, len(dit.blocks)), config.args.checkpoint_budget)
    else:
        policies = _left_out(config, layers)
    for name, policy in policies.items():
        layers[name].recompute = policy


def blocks_differ(config: RunConfig) -> bool:
    """Returns whether one block recomputes another part than the next."""
    return config.args.checkpoint_every > 1 or config.args.checkpoint_budget is not None


def without_recomputation(config: RunConfig) -> RunConfig:
    """Returns a configuration whose backward pass computes nothing again."""
    off = {
        "checkpoint_activations": "off",
        "checkpoint_every": 1,
        "checkpoint_budget": None,
        "checkpoint_offload": False,
    }
    return replace(config, args=config.args.model_copy(update=off))


def chosen_costs(config: RunConfig) -> list[BlockCost]:
    """Returns the cost of the policy that each block has."""
    costs = _costs(config, config.spec.layers)
    budget, default = config.args.checkpoint_budget, config.args.checkpoint_activations
    policies = _left_out(config, costs) if budget is None else policies_within(costs, budget)
    return [own[POLICIES.index(policies.get(name, default))] for name, own in costs.items()]


def recomputed_widths(config: RunConfig) -> list[int]:
    """Returns the widths of the blocks of a run that recompute something."""
    dit = build_meta_dit(config)
    set_recomputation(dit, config)
    policies = {each: getattr(each, "recompute", dit.recompute) for each in _layers(dit).values()}
    return [each.input_layernorm.normalized_shape[0] for each, policy in policies.items() if policy != "off"]


def _left_out(config: RunConfig, names: Iterable[str]) -> dict[str, Recompute]:
    """Returns `off` for the blocks that `args.checkpoint_every` leaves out, by names of their layers."""
    return {name: "off" for name in names if int(name.rpartition(".")[2]) % config.args.checkpoint_every}


def _costs(config: RunConfig, num_blocks: int) -> dict[str, BlockCosts]:
    """Counts blocks on samples of the largest size, in micro-batches of training."""
    dit, inputs = build_meta_dit(config, layers=num_blocks), build_meta_inputs(config, config.args.batch_size)
    return count_block_costs(dit, inputs, inputs_on_host=config.args.checkpoint_offload)


def _layers(dit: DiffusionTransformer) -> dict[str, BaseTransformerLayer]:
    """Returns SAT's layers of all blocks, of branches too, by name."""
    return {name: each for name, each in dit.named_modules() if isinstance(each, BaseTransformerLayer)}
