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
from torch.overrides import TorchFunctionMode


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


class _NothingRead(TorchFunctionMode):
    """Computes on the device what DeepSpeed's norms would wait for.

    `torch.tensor` copies its number to the device, and `masked_fill_` reads its value from there.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and isinstance(args[0], float) and "device" in kwargs:
            function, args = torch.full, ((), *args)
        if function is torch.Tensor.masked_fill_ and len(args) == 3 and isinstance(args[2], Tensor):
            tensor, mask, value = args
            function, args = torch.Tensor.copy_, (tensor, torch.where(mask, value, tensor))
        return function(*args, **kwargs)


def read_norm_once(engine: Any, read: StepRead) -> None:
    """Makes DeepSpeed's ZeRO optimizer receive its norm in host memory.

    Its own search for numbers that are not finite ends: the norm, which it tests in any case, shows them too.

    Args:
        engine: `deepspeed.DeepSpeedEngine`, at stages 1 to 3.
        read: Reads the norm.
    """
    optimizer: Any = engine.optimizer
    optimizer.check_overflow = lambda partition_gradients=True: None
    is_stage_3 = int(engine.zero_optimization_stage()) == 3
    name = "_get_norm_groups" if is_stage_3 else "scaled_global_norm"
    compute = getattr(optimizer, name)

    def norms_on_host(*options: Any, **more: Any) -> Any:
        with _NothingRead():
            norms = compute(*options, **more)
        return read.norms(norms) if is_stage_3 else read.norms([norms])[0]

    setattr(optimizer, name, norms_on_host)
