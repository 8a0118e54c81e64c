"""DeepSpeed's norms are computed without a wait: no operation among them reads the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sat_train.engine.step_read import StepRead, read_norm_once

# a copy of a host's number, its read from the device, and what reads inside its kernel
READS = {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::masked_fill_.Tensor"}


class Operations(TorchDispatchMode):
    """Collects the names of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _masked(norm: float, dtype: torch.dtype, seen: Operations) -> Tensor:
    """Returns what DeepSpeed makes of a norm, and lists what it computes for that."""
    norm_ = torch.tensor(norm, dtype=dtype)
    with seen:
        mask_nan_or_inf_with_val_inplace(norm_, device=norm_.device)
    return norm_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [0.0, 2.5, float("inf"), float("-inf"), float("nan")])
def test_a_norm_is_masked_as_deepspeed_does_and_nothing_is_read(norm: float, dtype: torch.dtype) -> None:
    theirs, ours = Operations(), Operations()
    optimizer = SimpleNamespace(scaled_global_norm=lambda: _masked(norm, dtype, ours))
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 2)
    read_norm_once(engine, StepRead())
    found, expected = optimizer.scaled_global_norm(), _masked(norm, dtype, theirs)
    assert (found.dtype, found.item()) == (expected.dtype, expected.item())
    assert theirs.names & READS, "what DeepSpeed reads is noticed"
    assert not ours.names & READS
