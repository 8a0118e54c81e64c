"""Whole runs of the embedded model, and the checkpoint of a real one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_parts.check import Check, Finding, Setting, seconds_of, within
from benchmarks.gpu_parts.random_run import CONFIGS, RandomRun, open_run, read_run, run_steps
from sat_train.checkpoint.manifest import Manifest
from sat_train.checkpoint.save import RunState, library_versions, save_training_checkpoint
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.models.build import compute_dtype
from sat_train.training.build import train
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.weights.names import dtype_name

_BATCH = 8  # samples of a step, on any number of ranks
_WORDS = (
    *("args.train_iters=4", "args.save_interval=2", "args.log_interval=1", "args.keep_last=null"),
    *("args.eval_interval=null", "args.valid_video_interval=null", "args.valid_data=null"),
    *("args.tensorboard=false", "args.num_workers=0", "args.batch_size=1", "args.lr_decay_style=constant"),
    *("data.params.max_num_frames=5", "args.warmup=0", "args.lr=1e-3", "args.compile=off"),
)
_WRITING_GBPS = 0.3  # of one rank: docs/benchmarks.md


def short_run(setting: Setting, name: str, *words: str, samples: int | None = None) -> RunConfig:
    """Reads four steps of the embedded model on the demo clips, with the same samples on any mesh."""
    device = "cuda" if setting.on_gpu else "cpu"
    samples = samples or (2 if setting.tiny else _BATCH)
    own = (
        f"args.save={setting.folder}",
        f"args.experiment_name={name}",
        f"args.device={device}",
        f"args.gradient_accumulation_steps={max(1, samples // setting.mesh.data_size)}",
    )
    return load_run_config([str(CONFIGS / "sft.yaml")], [*_WORDS, *own, *words])


def found_run(setting: Setting, name: str) -> Path:
    """Returns the run directory of a name."""
    return max(setting.folder.glob(f"{name}-*"))


def losses_of(folder: Path) -> dict[int, float]:
    """Returns the loss of each step of a run."""
    return {line["step"]: float(line["loss"]) for line in read_metrics(folder / "metrics.jsonl")}


def resumption(setting: Setting) -> Iterator[Finding]:
    """Yields whether a run that stops and resumes computes what one that does not stop computes."""
    words = ("args.deterministic=true",) if setting.on_gpu else ()
    read = partial(short_run, setting, samples=1)
    train(read("whole", *words), setting.mesh)
    whole = losses_of(found_run(setting, "whole"))
    train(read("halved", *words, "args.train_iters=2"), setting.mesh)
    train(read("halved", *words, "args.resume=must"), setting.mesh)
    halved = losses_of(found_run(setting, "halved"))
    for number in (3, 4):
        same = halved[number] == whole[number]
        yield Finding(f"loss of step {number}, resumed", halved[number], repr(whole[number]), same)


def saving(setting: Setting) -> Iterator[Finding]:
    """Yields how long a checkpoint of full fine-tuning of 2B stalls the run."""
    config = read_run(setting, "cogvideox_2b", "sft", "args.compile=off", "args.checkpoint_activations=full")
    folder = setting.folder / "saved"
    on_rank_0(setting.mesh, lambda: shutil.rmtree(folder, ignore_errors=True))
    on_rank_0(setting.mesh, lambda: folder.mkdir(parents=True))
    with open_run(setting, config) as run:
        run_steps(setting, run, 1)
        seconds = seconds_of(setting, lambda: _save(setting.mesh, run, folder))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    yield Finding("checkpoint, GB", size)
    yield Finding("stall, s", seconds, size / _WRITING_GBPS)
    if not setting.tiny:
        yield within("GB/s", size / seconds, _WRITING_GBPS, least=1, most=100)
    on_rank_0(setting.mesh, lambda: shutil.rmtree(folder))


def _save(mesh: ProcessMesh, run: RandomRun, folder: Path) -> None:
    manifest = Manifest(
        step=1,
        samples_consumed=mesh.data_size,
        world_size=mesh.world_size,
        data_size=mesh.data_size,
        model_size=mesh.model_size,
        dtype=dtype_name(compute_dtype(run.config.args)),
        trainable_only=False,
        config_digest=run.config.digest(),
        data_fingerprint="random",
        base_weights=None,
        versions=library_versions(),
    )
    state = RunState(
        run.engine.weights(), run.engine.fragments(), client_state={}, pieces=run.engine.pieces()
    )
    save_training_checkpoint(mesh, state=state, run_directory=folder, manifest=manifest)


def training(setting: Setting) -> Iterator[Finding]:
    """Yields the losses of a short run in bf16, from clips to weights."""
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.mesh.device)
    train(short_run(setting, "plain", "args.bf16=true"), setting.mesh)
    losses = losses_of(found_run(setting, "plain"))
    finite = len(losses) == 4 and all(map(math.isfinite, losses.values()))
    yield Finding("loss of step 4", losses.get(4, math.nan), "four finite losses", finite)


CHECKS = (
    Check("train", 0.5, "the training command's work on the demo clips, in bf16", training, on_cpu=False),
    Check("resume", 0.5, "stop and resume: the same bits, with deterministic kernels", resumption),
    Check("save", 2, "the stall of a checkpoint of 2B, 24 GB", saving),
)
