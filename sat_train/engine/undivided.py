"""The layout of ZeRO stage 0: each rank steps all parameters as they are.

A single process with fp32 weights has it at stages 1 and 2 too: there is nothing to divide, and no half
precision that needs a master copy. Norm, clipping and the skip of a gradient that is not finite are those of
DeepSpeed's stages 1 and 2, which its stage 0 does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.step_read import StepRead


def is_undivided(*, stage: int, ranks: int, is_half: bool, is_offloaded: bool) -> bool:
    """Checks whether a run has this layout.

    Args:
        stage: The ZeRO stage that was asked for.
        ranks: Processes in all.
        is_half: Weights are bf16 or fp16.
        is_offloaded: Optimizer states are in host memory.
    """
    return stage == 0 or (stage < 3 and ranks == 1 and not is_half and not is_offloaded)


def is_undivided_with(settings: Mapping[str, Any], mesh: ProcessMesh) -> bool:
    """Checks whether a run with DeepSpeed's dictionary has this layout."""
    zero = settings["zero_optimization"]
    return is_undivided(
        stage=zero["stage"],
        ranks=mesh.world_size,
        is_half=any(settings.get(name, {}).get("enabled") for name in ("fp16", "bf16")),
        is_offloaded=zero.get("offload_optimizer", {}).get("device", "none") != "none",
    )


class UndividedParameters(torch.optim.Optimizer):
    """DeepSpeed's optimizer at stage 0: clips the averaged gradients and hands the step on.

    Args:
        inner: The optimizer of the run, over these parameters.
        parameters: All that train, in the order of the module, in which their norms are summed.
        max_norm: Norm that gradients are clipped to; 0: they are not.

    Attributes:
        inner: The optimizer of the run.
        overflow: The last gradient was not finite and nothing was updated. DeepSpeed asks for it.
        read: Reads the norm.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, parameters: Iterable[Tensor], *, max_norm: float
    ) -> None:
        self.inner, self._parameters, self._max_norm = inner, list(parameters), max_norm
        super().__init__([{"params": self._parameters}], {"lr": 0.0})
        self.overflow = False
        self.read = StepRead()
        self._global_grad_norm: Tensor | None = None  # DeepSpeed's name

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Steps the parameters, unless a gradient is not finite; one that is missing counts as zero.

        Source: microsoft/DeepSpeed@v0.19.8 `runtime/zero/stage_1_and_2.py` `get_grad_norm_direct`,
        `unscale_and_clip_grads`.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        (norm,) = self.read.norms([_total_norm(gradients)])
        self._global_grad_norm = norm
        self.overflow = not bool(norm.isfinite())
        if self.overflow:
            return
        if self._max_norm:
            scale = ((norm + 1e-6) / self._max_norm).clamp(min=1.0)
            torch._foreach_mul_(gradients, 1.0 / scale)
        self.inner.step()


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Returns the norm of all gradients as one vector, summed in float64, a float32 scalar."""
    on_cpu = gradients[0].device.type == "cpu"
    norms = _norms_on_cpu(gradients) if on_cpu else torch._foreach_norm(gradients, 2, torch.float64)
    return torch.stack(list(norms)).square().sum().float().sqrt()


def _norms_on_cpu(gradients: list[Tensor]) -> Iterator[Tensor]:
    """Yields what `torch._foreach_norm` does, whose copies in float64 do not fit into a cache on a CPU."""
    copy = gradients[0].new_empty(max(each.numel() for each in gradients), dtype=torch.float64)
    for gradient in gradients:
        yield torch.linalg.vector_norm(copy[: gradient.numel()].view_as(gradient).copy_(gradient))
