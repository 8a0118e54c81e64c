"""Whole weights of an engine at any ZeRO stage, gathered by DeepSpeed: what checkpoints are compared with."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sat_train.engine.engine import TrainEngine


def gathered_weights(engine: TrainEngine, left_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns copies of parameters and buffers, in the order of the module. Ranks: all."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(engine.module.parameters()), enabled=engine.zero_stage == 3):
        state = engine.module.state_dict()
        return {name: tensor.clone() for name, tensor in state.items() if name not in left_out}
