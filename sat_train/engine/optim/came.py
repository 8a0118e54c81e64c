"""CAME: second moments as rows and columns, and updates trusted by their confidence.

    u = g / sqrt(F(g^2 + eps1; b2));  u = u / max(1, rms(u) / clip_threshold)
    m = b1 m + (1 - b1) u
    w = w - lr decay w - lr m / sqrt(F((u - m)^2 + eps2; b3))

F is the moving average of a matrix from those of its row and column means, r and c: r c / mean(r). A vector
keeps its whole average, and its update is m.

Source: Luo et al., arXiv:2307.02047, algorithm 2; decay and vectors as in came-pytorch 0.1.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_train.config.parts.optimizer_parts import CameParams


def build(params: CameParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups."""
    defaults = {
        "lr": params.lr,
        "betas": params.betas,
        "eps": params.eps,
        "clip_threshold": params.clip_threshold,
    }
    return Came(groups, defaults)


class Came(torch.optim.Optimizer):
    """CAME over whole weights; settings are those of `CameParams`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update = _update(weight.grad, self.state[weight], group)
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def _update(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    beta_1, beta_2, beta_3 = group["betas"]
    eps_1, eps_2 = group["eps"]
    update = _inverse_root(state, "exp_avg_sq", gradient.square().add_(eps_1), beta_2).mul_(gradient)
    rms = update.norm() / update.numel() ** 0.5
    update.div_((rms / group["clip_threshold"]).clamp_(min=1.0))
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(gradient)
    mean = state["exp_avg"].lerp_(update, 1 - beta_1)
    if gradient.dim() < 2:
        return mean
    instability = update.sub_(mean).square_().add_(eps_2)
    return _inverse_root(state, "exp_avg_res", instability, beta_3).mul_(mean)


def _inverse_root(state: dict[str, Tensor], name: str, square: Tensor, beta: float) -> Tensor:
    """Returns 1 / sqrt of the moving average of `square`, factored where it is a matrix."""
    if square.dim() < 2:
        return _average(state, name, square, beta).rsqrt()
    row = _average(state, f"{name}_row", square.mean(dim=-1), beta)
    column = _average(state, f"{name}_col", square.mean(dim=-2), beta)
    row = (row / row.mean(dim=-1, keepdim=True)).rsqrt_()
    return row.unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def _average(state: dict[str, Tensor], name: str, value: Tensor, beta: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, 1 - beta)
