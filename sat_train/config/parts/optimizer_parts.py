"""Slot `optimizer` (`deepspeed.optimizer`) and the optimizers that come with the package.

A builder gets the parameters and the parameter groups, and returns a `torch.optim.Optimizer`. Each group is a
dictionary with `params`, their `names`, their `weight_decay` and `lr_factor`, a factor on the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.record import Betas, Betas3, Texts, TwoFloats
from sat_train.config.parts.registry import Choice, Params, part


class OptimizerParams(Params):
    """Settings that every optimizer has.

    `state` names the values that it keeps for each element of a matrix, `state_bytes` is the size of one;
    rows, columns and vectors add little. An optimizer that is not `elementwise` needs more than an
    element and its gradient: the shape of the weight, or a sum over all weights. ZeRO stage 3 and tensor
    parallelism, which divide weights, refuse it. `has_one_rate` refuses learning-rate factors, and `package`
    is what it imports besides the dependencies of sat_train.
    """

    state: ClassVar[tuple[str, ...]] = ()
    state_bytes: ClassVar[int] = 4
    elementwise: ClassVar[bool] = True
    has_one_rate: ClassVar[bool] = False
    package: ClassVar[str] = ""

    lr: float = Field(1e-4, ge=0, description="Highest learning rate; the same setting as `args.lr`.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay; the same setting as `args.weight_decay`."
    )

    @classmethod
    def bytes_per_weight(cls) -> int:
        """Returns the bytes of optimizer state for each weight."""
        return cls.state_bytes * len(cls.state)

    def check(self, model: Any) -> Iterator[tuple[str, str]]:
        """Yields betas that are not decays."""
        betas = getattr(self, "betas", ())
        if not all(0 <= beta < 1 for beta in betas):
            yield "betas", f"{'two' if len(betas) == 2 else 'three'} numbers from 0 to below 1"


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


@part("optimizer", "AdamW8bit", build="sat_train.engine.optim.adamw8bit:build")
class Adam8bitParams(OptimizerParams):
    """AdamW with moments in 8 bits (bitsandbytes): a quarter of AdamW's state."""

    state: ClassVar[tuple[str, ...]] = ("state1", "state2")
    state_bytes: ClassVar[int] = 1
    elementwise: ClassVar[bool] = False
    package: ClassVar[str] = "bitsandbytes"

    betas: Betas = Field((0.9, 0.999), description="Decay of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    min_8bit_size: int = Field(
        4096, ge=1, description="Weights with fewer elements, such as biases, keep moments in fp32."
    )


@part("optimizer", "CAME", build="sat_train.engine.optim.came:build")
class CameParams(OptimizerParams):
    """CAME: Adam's first moment, and second moments as rows and columns, trusted by their confidence."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg",)
    elementwise: ClassVar[bool] = False

    betas: Betas3 = Field(
        (0.9, 0.95, 0.9999), description="Decay of the update, the squared gradient and the instability."
    )
    eps: TwoFloats = Field(
        (1e-30, 1e-16), description="Added to the squared gradient, and to the instability."
    )
    clip_threshold: float = Field(1.0, gt=0, description="Largest root mean square of a weight's update.")


@part("optimizer", "Prodigy", build="sat_train.engine.optim.prodigy:build")
class ProdigyParams(OptimizerParams):
    """Prodigy: Adam that estimates its own learning rate, `d`; `lr` is a factor on it, 1 as a rule."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "s", "p0")
    elementwise: ClassVar[bool] = False
    has_one_rate: ClassVar[bool] = True

    betas: Betas = Field((0.9, 0.95), description="Decay of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment, times d.")
    d0: float = Field(1e-6, gt=0, description="First estimate of the learning rate; it only grows.")
    d_coef: float = Field(
        1.0, gt=0, description="Factor on the estimate: 0.5 to 2 for slower or faster steps."
    )
    decouple: bool = Field(True, description="Decoupled weight decay, as in AdamW.")
    use_bias_correction: bool = Field(True, description="Adam's bias correction.")
    safeguard_warmup: bool = Field(
        True, description="Keep a warm-up of `lr` out of the estimate, which would grow too large."
    )


@part("optimizer", "Adafactor", build="sat_train.engine.optim.adafactor:build")
class AdafactorParams(OptimizerParams):
    """Adafactor: the second moment as rows and columns; the rate is relative to the size of a weight."""

    elementwise: ClassVar[bool] = False

    eps: TwoFloats = Field(
        (1e-30, 1e-3), description="Added to the squared gradient; least size of a weight for the rate."
    )
    clip_threshold: float = Field(1.0, gt=0, description="Largest root mean square of a weight's update.")
    decay_rate: float = Field(
        -0.8, ge=-1, lt=0, description="The second moment decays by 1 - step ** decay_rate."
    )
    scale_parameter: bool = Field(
        True, description="`lr` is a factor on the root mean square of each weight; false: `lr` itself."
    )


@part("optimizer", "Muon", build="sat_train.engine.optim.muon:build")
class MuonParams(OptimizerParams):
    """Muon: orthogonalised momentum for the matrices inside the network, AdamW for all other weights."""

    state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    elementwise: ClassVar[bool] = False

    adamw: Texts = Field(
        (r"patch_embed", r"pos_embed", r"time_embed", r"ofs_embed", r"final_layer"),
        description="Regular expressions searched in the names of matrices that AdamW takes too.",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum.")
    nesterov: bool = Field(True, description="Nesterov's momentum.")
    ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations.")
    betas: Betas = Field((0.9, 0.95), description="Decay of AdamW's moments.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
