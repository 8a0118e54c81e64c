"""Each optimizer computes what an implementation by others computes, and keeps the state that it declares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import came_pytorch
import prodigyopt
import pytest
import torch
from torch import Tensor, nn

from sat_train.config.parts.optimizer_parts import OptimizerConfig
from sat_train.config.parts.registry import parts_of
from sat_train.engine.optim.build import build_optimizer
from sat_train.models.trainable import group_parameters

STEPS = 50
DECAY = 0.1
Built = Callable[[list[dict[str, Any]]], Any]


def network() -> nn.Module:
    """Matrices, vectors and a convolution; one matrix is large enough for 8-bit moments."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), nn.Flatten(), nn.Linear(72, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 5)
    )


def train(module: nn.Module, optimizer: Any, lr: float) -> list[Tensor]:
    """Trains with a warm-up from zero, on gradients as small as those of a large model."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 3, 6, 6, generator=generator)
        loss = (module(images) - images.mean((2, 3)).repeat(1, 2)[:, :5]).square().mean()
        optimizer.zero_grad()
        (1e-3 * loss).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 5)
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def ours(name: str, lr: float, **params: Any) -> list[Tensor]:
    module = network()
    choice = OptimizerConfig.of(name, {"lr": lr, "weight_decay": DECAY, **params})
    groups = group_parameters(module, weight_decay=choice.params.weight_decay)
    return train(module, build_optimizer(choice, groups, dict(module.named_parameters())), lr)


def theirs(build: Built, lr: float, decay: float = DECAY) -> list[Tensor]:
    module = network()
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return train(module, build(groups), lr)


class Adam64:
    """AdamW as its paper writes it, in fp64."""

    def __init__(self, groups: list[dict[str, Any]], beta_1: float, beta_2: float, eps: float) -> None:
        self.param_groups, self.betas, self.eps, self.t = groups, (beta_1, beta_2), eps, 0
        self.state = {p: (p.detach().double(), 0.0, 0.0) for group in groups for p in group["params"]}

    def zero_grad(self) -> None:
        for parameter in self.state:
            parameter.grad = None

    def step(self) -> None:
        self.t += 1
        (b_1, b_2), eps = self.betas, self.eps
        for group in self.param_groups:
            for p in group["params"]:
                w, m, v = self.state[p]
                g = p.grad.double()
                m, v = b_1 * m + (1 - b_1) * g, b_2 * v + (1 - b_2) * g * g
                w = w - group["lr"] * group["weight_decay"] * w
                w = w - group["lr"] * (m / (1 - b_1**self.t)) / ((v / (1 - b_2**self.t)).sqrt() + eps)
                self.state[p] = (w, m, v)
                p.data.copy_(w)


def muon_and_adamw(groups: list[dict[str, Any]]) -> Any:
    """torch's two optimizers, each with its weights; the last matrix is the final layer."""
    (conv, hidden, last), vectors = groups[0]["params"], groups[1]["params"]
    muon = torch.optim.Muon([hidden], weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": [conv, last], "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    # fused as ours: Newton-Schulz in bf16 makes much of a last bit
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True)

    class Both:
        def __init__(self) -> None:
            self.param_groups = [*muon.param_groups, *adamw.param_groups]

        def zero_grad(self) -> None:
            muon.zero_grad()
            adamw.zero_grad()

        def step(self) -> None:
            muon.step()
            adamw.step()

    return Both()


def came(groups: list[dict[str, Any]]) -> Any:
    return came_pytorch.CAME(groups, lr=1e-3, betas=(0.9, 0.95, 0.9999))


def prodigy(groups: list[dict[str, Any]]) -> Any:
    settings = {"use_bias_correction": True, "safeguard_warmup": True, "d0": 1e-4}
    return prodigyopt.Prodigy(groups, betas=(0.9, 0.95), **settings)


def plain_prodigy(groups: list[dict[str, Any]]) -> Any:
    return prodigyopt.Prodigy(groups, betas=(0.9, 0.95), decouple=False, d_coef=0.5, d0=1e-4)


PLAIN_PRODIGY = {"decouple": False, "use_bias_correction": False, "safeguard_warmup": False, "d_coef": 0.5}

# Tolerances are shares of the distance that the weights move: fp32's rounding, but in the last two bf16 in
# Newton-Schulz and the noise of 8 bits.
CASES: dict[str, tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]], float]] = {
    "AdamW": (
        lambda: ours("AdamW", 1e-2, betas=(0.9, 0.95)),
        lambda: theirs(lambda groups: Adam64(groups, 0.9, 0.95, 1e-8), 1e-2),
        3e-5,
    ),
    "CAME": (lambda: ours("CAME", 1e-3), lambda: theirs(came, 1e-3), 3e-5),
    "Prodigy": (lambda: ours("Prodigy", 1.0, d0=1e-4), lambda: theirs(prodigy, 1.0), 3e-5),
    "Prodigy, coupled": (
        lambda: ours("Prodigy", 1.0, d0=1e-4, **PLAIN_PRODIGY),
        lambda: theirs(plain_prodigy, 1.0),
        3e-5,
    ),
    # torch's decay is not relative to the size of the weight, and its epsilon is for larger gradients
    "Adafactor": (
        lambda: ours("Adafactor", 1e-2, weight_decay=0.0),
        lambda: theirs(lambda groups: torch.optim.Adafactor(groups, eps=(1e-18, 1e-3)), 1e-2, decay=0.0),
        3e-5,
    ),
    "Muon": (lambda: ours("Muon", 1e-2, adamw=["^5"]), lambda: theirs(muon_and_adamw, 1e-2), 3e-5),
    "AdamW8bit": (
        lambda: ours("AdamW8bit", 1e-2, betas=(0.9, 0.95)),
        lambda: theirs(lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)), 1e-2),
        5e-2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_equals_an_implementation_of_others_over_50_steps(case: str) -> None:
    run, reference, tolerance = CASES[case]
    starts = network().parameters()
    for mine, other, start in zip(run(), reference(), starts, strict=True):
        moved = (other - start.detach()).norm()
        assert moved > 0
        assert (mine - other).norm() <= tolerance * moved


def test_the_8_bit_moments_are_those_of_the_package_alone() -> None:
    reference = theirs(lambda groups: bitsandbytes.optim.AdamW8bit(groups, betas=(0.9, 0.95)), 1e-2)
    for mine, other in zip(ours("AdamW8bit", 1e-2, betas=(0.9, 0.95)), reference, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", sorted(parts_of("optimizer")))
def test_its_state_takes_the_bytes_that_it_declares(name: str) -> None:
    weight = nn.Parameter(torch.randn(512, 512))
    choice = OptimizerConfig.of(name, {"lr": 1e-3})
    module = nn.ParameterDict({"weight": weight})
    groups = group_parameters(module, weight_decay=choice.params.weight_decay)
    optimizer = build_optimizer(choice, groups, {"weight": weight})
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    tensors = [each for each in optimizer.state[weight].values() if isinstance(each, Tensor)]
    measured = sum(each.numel() * each.element_size() for each in tensors) / weight.numel()
    declared = choice.params.bytes_per_weight()
    assert declared <= measured <= declared + 0.1  # rows, columns, and the scales of blocks


def test_it_is_named_in_the_table_of_optimizers() -> None:
    """Every optimizer has a row in docs/recipes.md with its bytes."""
    lines = Path("docs/recipes.md").read_text(encoding="utf-8").splitlines()
    for name, each in parts_of("optimizer").items():
        row = next(line for line in lines if line.startswith("|") and f"`{name}`" in line.split("|")[1])
        assert row.split("|")[2].strip().startswith(str(each.params.bytes_per_weight()))  # type: ignore[attr-defined]
