"""Muon for the matrices inside the network, AdamW for all other weights; both are torch's own.

    m = b m + (1 - b) g;  u = (1 - b) g + b m;  o = NewtonSchulz(u), which is about U V' of u = U S V'
    w = w - lr decay w - 0.2 sqrt(max(rows, columns)) lr o

The factor gives an update the size of AdamW's, so that both share one learning rate.

Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; the factor: Liu et al., arXiv:2502.16982,
section 2.2.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from sat_train.config.parts.optimizer_parts import MuonParams


def build(params: MuonParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups."""
    matrices = [part for group in groups if (part := _part(group, params, of_muon=True))]
    others = [part for group in groups if (part := _part(group, params, of_muon=False))]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=params.lr,
            momentum=params.momentum,
            nesterov=params.nesterov,
            ns_steps=params.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    if others:
        adamw = torch.optim.AdamW(others, lr=params.lr, betas=params.betas, eps=params.eps, fused=True)
        optimizers.append(adamw)
    return Together(optimizers)


def _part(group: dict[str, Any], params: MuonParams, *, of_muon: bool) -> dict[str, Any] | None:
    """Returns the group with those of its weights that one of the two optimizers takes; None without any."""
    pairs = zip(group["names"], group["params"], strict=True)
    part = [(name, weight) for name, weight in pairs if _is_of_muon(name, weight, params) == of_muon]
    names, weights = [name for name, _ in part], [weight for _, weight in part]
    return {**group, "names": names, "params": weights} if part else None


def _is_of_muon(name: str, weight: torch.Tensor, params: MuonParams) -> bool:
    return weight.dim() == 2 and not any(re.search(pattern, name) for pattern in params.adamw)


class Together(torch.optim.Optimizer):
    """Optimizers of disjoint weights as one: it has the groups and the state of all."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._optimizers = optimizers
        for each in optimizers:
            each.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Updates the weights of each."""
        for each in self._optimizers:
            each.step()
