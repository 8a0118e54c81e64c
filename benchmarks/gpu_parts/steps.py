"""Steps of the released models with random weights: seconds, MFU and memory against the plan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_parts.check import Check, Finding, Setting, at_most, within
from benchmarks.gpu_parts.random_run import RandomRun, open_run, read_run, run_steps, step_bytes
from sat_train.config.summary import describe_activations
from sat_train.models.kernels import chosen_kernels
from sat_train.planning.activations import settle_for_gpus
from sat_train.planning.planner import Plan, Planner

_STEPS = 4
_MODELS = {"2b": "cogvideox_2b", "5b": "cogvideox_5b", "1.5": "cogvideox1.5_5b"}
# what is run: model, recipe, words, and minutes on one H100
_RUNS = (
    ("2b", "sft", "off", 1),
    ("2b", "sft", "blocks", 1),
    ("2b", "lora", "blocks", 1),
    ("5b", "lora", "off", 1.5),
    ("5b", "lora", "blocks", 1.5),
    ("1.5", "lora", "blocks", 3),
)


def step(setting: Setting, *, model: str, recipe: str, compiled: str) -> Iterator[Finding]:
    """Yields what a training step of a run costs."""
    words = (f"args.compile={compiled}", "args.checkpoint_activations=auto")
    config = settle_for_gpus(read_run(setting, _MODELS[model], recipe, *words), setting.mesh)
    yield Finding("activations", describe_activations(config.args))
    plan = Planner(setting.card, setting.mesh.world_size).plan(config)
    with open_run(setting, config) as run:
        yield from _of_run(setting, run, plan, is_eager=compiled == "off")


def _of_run(setting: Setting, run: RandomRun, plan: Plan, *, is_eager: bool) -> Iterator[Finding]:
    first = run_steps(setting, run, 1)
    if setting.on_gpu:  # building takes another peak than training
        torch.cuda.reset_peak_memory_stats(setting.mesh.device)
    steps = run_steps(setting, run, _STEPS)
    finite = all(map(math.isfinite, steps.losses))
    yield Finding("last loss", steps.losses[-1], "finite", finite)
    # a dynamic loss scale settles in the first steps
    least = 1 if run.config.args.fp16 else _STEPS
    yield Finding("steps that updated the weights", steps.applied, f">= {least}", steps.applied >= least)
    yield Finding("first step, s", first.first_s)
    if setting.on_gpu:
        yield at_most("waits for the GPU in a step", _waits(setting, run), 1)
        yield from _against_plan(setting, plan, steps.median_s, is_eager=is_eager)


def _waits(setting: Setting, run: RandomRun) -> int:
    """Returns how often the host waits for the GPU in a step: PyTorch warns of each such call."""
    kernels = chosen_kernels(run.config.args, setting.mesh.device)
    with kernels, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run.train_step.step(_STEPS + 2, 1e-4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _against_plan(setting: Setting, plan: Plan, seconds: float, *, is_eager: bool) -> Iterator[Finding]:
    """Yields time and memory next to the plan, which counts eager blocks: compiled ones take less."""
    yield within("a step, s", seconds, plan.step.total, least=0.5, most=1.25)
    mfu = plan.tflops / seconds / plan.hardware.peak_tflops
    yield Finding("MFU", f"{mfu:.1%}", f"{plan.mfu:.1%}")
    peak = torch.cuda.max_memory_allocated(setting.mesh.device)
    least = 0.85 if is_eager else 0.0
    yield within("peak, GB", peak / 1e9, step_bytes(plan.phases) / 1e9, least=least, most=1.05)
    reserved = torch.cuda.max_memory_reserved(setting.mesh.device)
    yield at_most("reserved over allocated", reserved / peak, 1.25)


CHECKS = tuple(
    Check(
        f"step_{model}_{recipe}" + ("_compiled" if compiled == "blocks" else ""),
        minutes,
        f"a step of {_MODELS[model]}, {recipe}, {'compiled' if compiled == 'blocks' else 'eager'}",
        partial(step, model=model, recipe=recipe, compiled=compiled),
        on_cpu=compiled == "off",
    )
    for model, recipe, compiled, minutes in _RUNS
)
