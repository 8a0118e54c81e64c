"""A few blocks: precision, compilation, and what is recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_parts.check import (
    Check,
    Finding,
    Setting,
    at_most,
    peak_of,
    relative_error,
    seconds_of,
    within,
)
from benchmarks.gpu_parts.random_run import build_random_dit, open_run, read_run, run_steps
from sat_train.config import RunConfig
from sat_train.models.attention import attention_kernels
from sat_train.planning.counting import count_passes

_FOUR = "model.network_config.params.num_layers=4"
_HALF = 0.01  # losses and norms of half precision, which add up in another order


def precision(setting: Setting) -> Iterator[Finding]:
    """Yields how far losses in half precision are from those in fp32, and whether fp16 settles."""
    model, steps = "cogvideox_tiny", 3
    with open_run(setting, read_run(setting, model, "sft")) as run:
        whole = run_steps(setting, run, steps)
    yield Finding("fp32: last loss", whole.losses[-1])
    with open_run(setting, read_run(setting, model, "sft", "args.bf16=true")) as run:
        half = run_steps(setting, run, steps)
    yield at_most("bf16: relative error of losses", relative_error(half.losses, whole.losses), 0.03)
    if not setting.on_gpu:
        return  # torch computes float16 on the CPU, but not all of it
    with open_run(setting, read_run(setting, model, "sft", "args.fp16=true")) as run:
        scaled = run_steps(setting, run, 30)
        scale = float(run.engine.counters()["cur_scale"])
    yield at_most("fp16: steps skipped until the scale fits", 30 - scaled.applied, 16)
    yield at_most("fp16: relative error of losses", relative_error(scaled.losses[:1], whole.losses[:1]), 0.03)
    yield Finding("fp16: loss scale", scale, ">= 1", scale >= 1 and math.isfinite(scaled.losses[-1]))


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of a few blocks.

    Args:
        norm: Of the gradient.
        peak: Bytes besides weights and gradients.
        first_s: Seconds of the first, which compiles.
        later_s: Seconds of the fastest of those after it.
    """

    norm: float
    peak: float
    first_s: float
    later_s: float


def compilation(setting: Setting) -> Iterator[Finding]:
    """Yields what compiled blocks are worth; a CPU, where code takes minutes to make, only traces them."""
    backend = "inductor" if setting.on_gpu else "eager"
    for recipe in ("sft", "lora") if setting.on_gpu else ("lora",):
        words = (_FOUR, "args.bf16=true", "args.checkpoint_activations=full")
        config = read_run(setting, "cogvideox_5b", recipe, *words)
        eager, compiled = (_measured(setting, config, backend=name) for name in (None, backend))
        yield Finding(f"{recipe}, compiled: first pass, s", compiled.first_s)
        yield Finding(f"{recipe}, compiled: a pass, s", compiled.later_s, eager.later_s)
        yield at_most(f"{recipe}, error of the gradient's norm", abs(compiled.norm / eager.norm - 1), _HALF)
        if setting.on_gpu:
            faster = eager.later_s / compiled.later_s
            yield within(f"{recipe}, eager over compiled", faster, 1.1, least=1, most=math.inf)
            yield at_most(f"{recipe}, compiled peak over eager", compiled.peak / eager.peak, 1.05)


def recomputation(setting: Setting) -> Iterator[Finding]:
    """Yields peak and time of each policy; the gradient is the same."""
    expected = math.nan
    for policy in ("off", "gemm", "attention", "full"):
        words = (_FOUR, "args.bf16=true", f"args.checkpoint_activations={policy}")
        config = read_run(setting, "cogvideox_5b", "sft", *words)
        found = _measured(setting, config)
        expected = found.norm if policy == "off" else expected
        planned = count_passes(config, batch_size=1).peak
        yield within(f"{policy}: peak, MB", found.peak / 1e6, planned / 1e6, least=0.9, most=1.1)
        yield Finding(f"{policy}: a pass, s", found.later_s)
        yield at_most(f"{policy}: error of the norm", abs(found.norm / expected - 1), _HALF)


def _measured(setting: Setting, config: RunConfig, *, backend: str | None = None) -> Passes:
    dit, inputs = build_random_dit(setting, config), _inputs(setting, config)
    if backend is not None:
        dit.compile_blocks(backend=backend)

    def run() -> None:
        dit(**inputs).float().square().mean().backward()

    with attention_kernels(config.args, setting.mesh.device):
        first_s = seconds_of(setting, run)
        gradients = [parameter.grad for parameter in dit.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        dit.zero_grad()
        del gradients
        for parameter in dit.parameters():
            if parameter.requires_grad:  # the plan counts gradients with the states
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        peak = peak_of(setting, dit, run)
        later_s = seconds_of(setting, run, repeats=3 if setting.on_gpu else 1)
    return Passes(norm, peak, first_s, later_s)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _inputs(setting: Setting, config: RunConfig) -> dict[str, Tensor]:
    spec, data = config.spec, config.require_data().params
    latent = spec.latent(data.max_num_frames, *data.video_size)
    size = (1, latent.padded_frames, spec.in_channels, latent.height, latent.width)
    like = {"device": setting.mesh.device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    return {
        "latent_btchw": torch.randn(size, **like),
        "timesteps_b": torch.tensor([500], device=setting.mesh.device),
        "text_bld": torch.randn(1, spec.text.max_length, spec.text_width, **like),
    }


CHECKS = (
    Check("precision", 1, "bf16 and fp16 follow fp32; the loss scale settles", precision),
    Check("compile", 2, "compiled blocks: speed, memory, same gradients", compilation),
    Check("recompute", 1, "peak of each policy against the plan; same gradients", recomputation),
)
