"""Several GPUs: bandwidth, ZeRO, ways of reducing, tensor parallelism, and another number of ranks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from benchmarks.gpu_parts.check import Check, Finding, Setting, at_most, relative_error, seconds_of, within
from benchmarks.gpu_parts.random_run import Measured, Steps, measure_steps, planned_peak, read_run
from benchmarks.gpu_parts.runs import found_run, losses_of, short_run
from sat_train.checkpoint.layout import committed_steps
from sat_train.config import RunConfig
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.environment import RankEnv
from sat_train.distributed.processes import start_processes, stop_processes
from sat_train.training.build import train

_STEPS = 4
_ELSEWHERE = "elsewhere"
_WORDS = (
    *("model.network_config.params.num_layers=4", "args.bf16=true", "args.compile=off"),
    "args.checkpoint_activations=full",
)
_SUMS = 0.01  # losses in bf16, whose gradients are summed in another order
_WAYS = {
    "all-reduce": ("deepspeed.zero_optimization.overlap_comm=false",),
    "overlapped": ("deepspeed.zero_optimization.overlap_comm=true",),
    "to owners": (
        "deepspeed.zero_optimization.overlap_comm=false",
        "deepspeed.zero_optimization.use_multi_rank_bucket_allreduce=false",
    ),
    "whole buckets": ("deepspeed.zero_optimization.reduce_scatter=false",),
    "fp32 sums": (
        "deepspeed.communication_data_type=fp32",
        "deepspeed.data_types.grad_accum_dtype=fp32",
    ),
}


def bandwidth(setting: Setting) -> Iterator[Finding]:
    """Yields the rate of each collective, as the plan counts it: bytes that leave a rank."""
    ranks, device = setting.mesh.world_size, setting.mesh.device
    count = (1 << 29 if setting.on_gpu else 1 << 18) // ranks * ranks
    whole = torch.zeros(count, dtype=torch.bfloat16, device=device)
    part = whole[: count // ranks].clone()
    # gloo has no reduce-scatter of bfloat16
    calls = {
        "all-reduce": (2, partial(dist.all_reduce, whole)),
        "all-gather": (1, partial(dist.all_gather_into_tensor, whole, part)),
    }
    if setting.on_gpu:
        calls["reduce-scatter"] = (1, partial(dist.reduce_scatter_tensor, part, whole))
    planned = setting.card.collective_gbps(ranks)
    for name, (crossings, call) in calls.items():
        call()
        seconds = seconds_of(setting, call, repeats=5)
        rate = crossings * (ranks - 1) / ranks * whole.nbytes / seconds / 1e9
        if setting.on_gpu:
            yield within(f"{name} of {whole.nbytes / 1e9:.1f} GB, GB/s", rate, planned, least=0.7, most=3)
        else:
            yield Finding(f"{name}, GB/s", rate)


def stages(setting: Setting) -> Iterator[Finding]:
    """Yields losses, seconds and memory of each ZeRO stage."""
    expected: Steps | None = None
    for stage in (1, 2, 3):
        words = (*_WORDS, f"args.zero_stage={stage}")
        found = _measured(setting, words)
        steps, expected = found.steps, expected or found.steps
        yield at_most(f"stage {stage}: error of losses", relative_error(steps.losses, expected.losses), _SUMS)
        yield Finding(f"stage {stage}: a step, s", steps.median_s)
        if setting.on_gpu:
            limit = planned_peak(setting, _config(setting, words)) / 1e9
            yield within(f"stage {stage}: peak, GB", found.peak / 1e9, limit, least=0.7, most=1.05)


def reductions(setting: Setting) -> Iterator[Finding]:
    """Yields losses and seconds of the ways in which stage 2 reduces gradients."""
    expected: Steps | None = None
    for name, words in _WAYS.items():
        steps = _measured(setting, (*_WORDS, "args.zero_stage=2", *words)).steps
        expected = expected or steps
        yield at_most(f"{name}: error of losses", relative_error(steps.losses, expected.losses), _SUMS)
        yield Finding(f"{name}: a step, s", steps.median_s, expected.median_s)


def tensor_parallelism(setting: Setting) -> Iterator[Finding]:
    """Yields losses of two ranks that share a model, next to those of ranks with a model each.

    It starts the processes again as another mesh, so it comes last.
    """
    if setting.mesh.world_size % 2:
        yield Finding("ranks", setting.mesh.world_size, "an even number, to share models in pairs")
        return
    expected = _measured(setting, (*_WORDS, "args.zero_stage=1")).steps
    store, env = PrefixStore("pairs", setting.mesh.store), _env(setting)
    stop_processes()
    device = "cuda" if setting.on_gpu else "cpu"
    mesh = start_processes(env, device=device, model_parallel_size=2, store=store)
    paired = replace(setting, mesh=mesh)
    for compiled in ("off", "blocks") if setting.on_gpu else ("off",):
        words = (*_WORDS, "args.zero_stage=1", "args.model_parallel_size=2", "args.batch_size=2")
        steps = _measured(paired, (*words, f"args.compile={compiled}")).steps
        name = "pairs, compiled" if compiled == "blocks" else "pairs"
        yield at_most(f"{name}: error of losses", relative_error(steps.losses, expected.losses), _SUMS)
        yield Finding(f"{name}: a step, s", steps.median_s, expected.median_s)


def _env(setting: Setting) -> RankEnv:
    mesh = setting.mesh
    if not setting.on_gpu:
        return RankEnv(mesh.rank, mesh.rank, mesh.world_size, mesh.world_size, "127.0.0.1", 1, "torchrun")
    return RankEnv.read()


def _measured(setting: Setting, words: Sequence[str]) -> Measured:
    return measure_steps(setting, _config(setting, words), 2 if setting.tiny else _STEPS)


def _config(setting: Setting, words: Sequence[str]) -> RunConfig:
    return read_run(setting, "cogvideox_5b", "sft", *words)


def train_for_others(setting: Setting) -> Iterator[Finding]:
    """Yields the losses of a short run, which `resume_here` resumes on another number of ranks."""
    on_rank_0(setting.mesh, lambda: _remove_runs(setting, _ELSEWHERE))
    train(short_run(setting, _ELSEWHERE), setting.mesh)
    losses = losses_of(found_run(setting, _ELSEWHERE))
    finite = len(losses) == 4 and all(map(math.isfinite, losses.values()))
    yield Finding("loss of step 4", losses[4], "four finite losses", finite)


def _remove_runs(setting: Setting, name: str) -> None:
    for folder in setting.folder.glob(f"{name}-*"):
        shutil.rmtree(folder)


def resume_here(setting: Setting) -> Iterator[Finding]:
    """Yields the losses of the last steps of `train_for_others`, resumed on these ranks."""
    original, name = found_run(setting, _ELSEWHERE), f"on{setting.mesh.world_size}"
    assert 2 in committed_steps(original), f"{original} has no step 2: run train_for_others first"
    on_rank_0(setting.mesh, lambda: _remove_runs(setting, name))
    copy = setting.folder / original.name.replace(_ELSEWHERE, name, 1)
    on_rank_0(setting.mesh, lambda: shutil.copytree(original, copy))
    train(short_run(setting, name, f"args.resume={copy / '2'}"), setting.mesh)
    expected, found = losses_of(original), losses_of(copy)
    for number in (3, 4):
        error = abs(found[number] / expected[number] - 1)
        yield at_most(f"error of step {number} on {setting.mesh.world_size} ranks", error, 1e-4)


CHECKS = (
    Check("bandwidth", 0.5, "all-reduce, all-gather, reduce-scatter", bandwidth),
    Check("stages", 3, "ZeRO 1, 2, 3: same losses; seconds and memory", stages),
    Check("reductions", 3, "overlap, owners, whole buckets, fp32 sums: same losses; seconds", reductions),
    Check("train_for_others", 1, "a short run, for resume_here", train_for_others),
    Check("resume_here", 1, "that run, resumed on these ranks, as many or not", resume_here),
    Check("tensor_parallel", 2, "pairs of ranks share a model: same losses", tensor_parallelism),
)
