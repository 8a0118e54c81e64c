"""Which weights decay and which do not."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters in one or two groups: matrices decay, biases and norms do not.

    An empty group is left out: DeepSpeed drops empty groups after others have counted them.

    Args:
        module: Whose parameters with `requires_grad` are trained.
        weight_decay: Decay of the matrices.

    Source: THUDM/SwissArmyTransformer@63dc23a `sat/training/deepspeed_training.py`
        `get_params_for_weight_decay_optimization`.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert trainable, "no parameter is trainable"
    decaying = [parameter for parameter in trainable if parameter.ndim > 1]
    steady = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": steady, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
