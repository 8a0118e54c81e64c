"""Prodigy: Adam that estimates its own learning rate d, from how far the weights have come.

    a = d lr sqrt(1 - b2^t) / (1 - b1^t);  b3 = sqrt(b2)
    n = b3 n + (d / d0) a <g, w0 - w>;  s = b3 s + (d / d0) a g, with a safeguard d in place of a
    m = b1 m + (1 - b1) d g;  v = b2 v + (1 - b2) d^2 g^2
    d = max(d, d_coef n / |s|_1)
    w = w - a decay w - a m / (sqrt(v) + d eps), with the new d

n and |s|_1 are sums over all weights: d is one number for all groups and all ranks.

Source: Mishchenko and Defazio, arXiv:2306.06101, algorithm 4; as prodigyopt 1.1.2 computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sat_train.config.parts.optimizer_parts import ProdigyParams


def build(params: ProdigyParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups."""
    return Prodigy(groups, params)


class Prodigy(torch.optim.Optimizer):
    """Prodigy over whole weights.

    Args:
        groups: Parameter groups of one learning rate.
        params: Settings.

    Attributes:
        counters: What it keeps besides the state of weights: estimate `d`, numerator `n`, steps `t`.
        sum_over_ranks: Sums a tensor over all ranks that own weights; the engine sets it.
    """

    def __init__(self, groups: list[dict[str, Any]], params: ProdigyParams) -> None:
        super().__init__(groups, {"lr": params.lr})
        self._params = params
        self.counters: dict[str, float] = {"d": params.d0, "n": 0.0, "t": 0.0}
        self.sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums

    def metrics(self) -> dict[str, float]:
        """Returns the estimate, and the learning rate that comes of it."""
        d = self.counters["d"]
        return {"prodigy_d": d, "effective_lr": d * self.param_groups[0]["lr"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates the estimate and the weights. At a learning rate of 0, where a warm-up begins, nothing.

        Ranks: all.
        """
        if self.param_groups[0]["lr"] == 0:
            return
        params, counters = self._params, self.counters
        d, rate = counters["d"], self._rate()
        sums = []
        for weight, decay in self._weights():
            if decay and not params.decouple:
                weight.grad.add_(weight, alpha=decay)
            sums.append(self._average(weight, d, rate))
        own = torch.stack(sums).double().sum(0) if sums else torch.zeros(2, dtype=torch.float64)
        moved, slope = self.sum_over_ranks(own).tolist()  # the only wait
        if slope == 0:  # there was no gradient
            return
        counters["n"] = params.betas[1] ** 0.5 * counters["n"] + moved
        counters["d"] = max(d, params.d_coef * counters["n"] / slope)
        counters["t"] += 1
        for weight, decay in self._weights():
            state = self.state[weight]
            if decay and params.decouple:
                weight.mul_(1 - decay * rate)
            root = state["exp_avg_sq"].sqrt().add_(counters["d"] * params.eps)
            weight.addcdiv_(state["exp_avg"], root, value=-rate)

    def _weights(self) -> Iterator[tuple[Any, float]]:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    yield weight, group["weight_decay"]

    def _rate(self) -> float:
        rate = self.counters["d"] * float(self.param_groups[0]["lr"])
        if not self._params.use_bias_correction:
            return rate
        beta_1, beta_2 = self._params.betas
        steps = self.counters["t"] + 1
        return float(rate * (1 - beta_2**steps) ** 0.5 / (1 - beta_1**steps))

    def _average(self, weight: Tensor, d: float, rate: float) -> Tensor:
        """Adds the gradient to the averages of a weight; returns its share of the sums, [2]."""
        state, gradient, params = self.state[weight], weight.grad, self._params
        assert gradient is not None, "only weights with a gradient are averaged"
        if not state:
            state["p0"] = weight.detach().clone()
            state.update({name: torch.zeros_like(weight) for name in ("s", "exp_avg", "exp_avg_sq")})
        beta_1, beta_2 = params.betas
        moved = torch.dot(gradient.flatten(), (state["p0"] - weight).flatten()) * (d / params.d0 * rate)
        state["exp_avg"].mul_(beta_1).add_(gradient, alpha=d * (1 - beta_1))
        state["exp_avg_sq"].mul_(beta_2).addcmul_(gradient, gradient, value=d * d * (1 - beta_2))
        step = d if params.safeguard_warmup else rate
        state["s"].mul_(beta_2**0.5).add_(gradient, alpha=d / params.d0 * step)
        return torch.stack([moved, state["s"].abs().sum()])
