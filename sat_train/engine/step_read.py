"""Reads norm of the gradient and flags of the ranks from the device in one copy, the one wait of a step.

DeepSpeed reads the norm from the device up to three times a step: to find numbers that are not finite, to
decide on the update, and to clip. Here it gets the norm in host memory, where reading it waits for nothing.

Source: microsoft/DeepSpeed@v0.19.8 `runtime/zero/stage_1_and_2.py` `step`, `runtime/zero/stage3.py` `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StepRead:
    """Copies norms to the host together with flags, once a step."""

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._values: list[float] = []

    def expect(self, flags: Tensor) -> None:
        """Sets the flags of the next step.

        Args:
            flags: [f], float32, on the device, the same on all ranks. The norm becomes infinite where the
                first is not 0, so that the weights are not updated.
        """
        self._flags = flags

    def norms(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """Returns norms in host memory, each in its dtype. This is the wait.

        Args:
            norms: Scalars, on the device.
        """
        together = torch.stack([norm.double() for norm in norms])
        if self._flags is not None:
            together = torch.cat([together, self._flags.to(together)])
        values = together.tolist()
        self._values = values[len(norms) :]
        if self._values and self._values[0]:
            values = [float("inf")] * len(norms)
        return [torch.tensor(value, dtype=norm.dtype) for value, norm in zip(values, norms, strict=False)]

    def take_flags(self) -> tuple[float, ...]:
        """Returns the flags of the step that has just ended, which are in host memory by now."""
        flags, self._flags, self._values = tuple(self._values), None, []
        return flags


def read_norm_once(engine: Any, read: StepRead) -> None:
    """Makes DeepSpeed's ZeRO optimizer receive its norm in host memory.

    Its own search for numbers that are not finite ends: the norm, which it tests in any case, shows them too.

    Args:
        engine: `deepspeed.DeepSpeedEngine`, at stages 1 to 3.
        read: Reads the norm.
    """
    optimizer: Any = engine.optimizer
    optimizer.check_overflow = lambda partition_gradients=True: None
    if int(engine.zero_optimization_stage()) == 3:
        groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: read.norms(groups())
    else:
        total = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: read.norms([total(norm_type)])[0]
