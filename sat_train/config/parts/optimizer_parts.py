"""Slot `optimizer` (`deepspeed.optimizer`) and the optimizers that come with the package.

A builder gets the parameters and the parameter groups, and returns a `torch.optim.Optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.record import Betas
from sat_train.config.parts.registry import Choice, Params, part


class OptimizerParams(Params):
    """Settings that every optimizer has.

    `state` names the fp32 values that it keeps for each weight. An optimizer that is not `elementwise` needs
    the shape of a weight, which ZeRO flattens.
    """

    state: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True

    lr: float = Field(1e-4, ge=0, description="Highest learning rate; the same setting as `args.lr`.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay; the same setting as `args.weight_decay`."
    )

    @classmethod
    def bytes_per_weight(cls) -> int:
        """Returns the bytes of optimizer state for each weight."""
        return 4 * len(cls.state)


class OptimizerConfig(Choice):
    """The optimizer of the trained weights."""

    slot: ClassVar[str] = "optimizer"
    key: ClassVar[str] = "type"

    type: str = Field("AdamW", description="The optimizer; Adam and AdamW are the same here.")
    params: OptimizerParams = Field(description="Its settings.")


@part("optimizer", "Adam", build="sat_train.engine.optim.adamw:build")
@part("optimizer", "AdamW", build="sat_train.engine.optim.adamw:build")
class AdamParams(OptimizerParams):
    """Adam with decoupled weight decay, under both names, as SAT's FusedEmaAdam had it."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    betas: Betas = Field((0.9, 0.999), description="Decay of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")

    def check(self, model: Any) -> Iterator[tuple[str, str]]:
        """Yields betas that are not decays."""
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", "two numbers from 0 to below 1"
