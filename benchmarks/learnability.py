"""Compares held-out losses of a narrow model with and without each kind of condition.

    python benchmarks/learnability.py --work /tmp/learnability
    python benchmarks/learnability.py --work /tmp/learnability --kinds channels branch

Each run is the training command on the `mosaic` set of `tools/make_control_videos.py`, whose clips are
determined by their fields and by nothing else. All runs see the same samples, noise and timesteps, and share
one cache, which is filled before. Run directories and data stay in `--work`; a run that is there is not
repeated.

Runs start from random weights and train everything, but for the branch: it is what is added to a trained
model. `branch` starts from the weights of `none`, which stay frozen, and is compared with `longer`, which
trains all of them for as many steps more, without control. Its time includes that of `none`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_SHARE, MOST_CORE_SECONDS = 0.5, 2 * 180  # of the loss without condition; 3 minutes of 2 cores
TRAIN_CLIPS, VALID_CLIPS = 192, 32
NETWORK, OPTIMIZER = "model.network_config.params", "deepspeed.optimizer.params"
COMMON = (
    *("args.device=cpu", "args.seed=0"),
    *("args.batch_size=8", "args.lr=2e-3", "args.warmup=0.1", "args.clip_grad=1.0", "args.weight_decay=0.01"),
    *("args.eval_iters=4", "args.eval_batch_size=8", "args.valid_video_interval=null"),
    *("args.num_workers=0", "args.log_interval=50", "args.tensorboard=false", "args.keep_last=1"),
    *(f"{OPTIMIZER}.betas=[0.9,0.99]", f"{NETWORK}.num_layers=3", "data.params.views=1"),
)
# Kinds that start from the weights of `none`, and the kind that each is compared with.
STARTED = {"longer": "none", "branch": "longer"}
CONTROL = "data.fields.control.kind=video"
# A condition named `c`, and what reads it.
KINDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "longer": (),
    "frames": (
        "model.conditions.c.target=FramesInSlot",
        "model.conditions.c.params.noise_log_mean=null",
    ),
    "branch": (
        CONTROL,
        "model.conditions.c.target=ControlVideo",
        "model.conditions.c.params.into=extras",
        "model.modules.branch.target=ControlBranch",
        "model.modules.branch.params.condition=c",
        "model.modules.branch.params.blocks=2",
    ),
    "channels": (CONTROL, "model.conditions.c.target=ControlVideo"),
    "inpainting": ("data.fields.mask.kind=mask", "model.conditions.c.target=Inpainting"),
    "reference": ("data.fields.reference.kind=image", "model.conditions.c.target=ReferenceFrames"),
}


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        loss: Held-out loss after the last step.
        by_timestep: The same by timestep.
        seconds: Of the training command, start included.
        core_seconds: Seconds of all its threads.
    """

    loss: float
    by_timestep: dict[str, float]
    seconds: float
    core_seconds: float


def command(verb: str, work: Path, kind: str, steps: int) -> list[str]:
    """Returns a command of the run of a kind."""
    data = work / "control" / "mosaic"
    return [
        *(sys.executable, "-m", "sat_train.cli.main", verb, "--base", str(ROOT / "configs/sft.yaml")),
        *COMMON,
        *start_of(work, kind),
        *KINDS[kind],
        f"args.train_data=[{data}/train/manifest.jsonl]",
        f"args.valid_data=[{data}/valid/manifest.jsonl]",
        *(f"args.train_iters={steps}", f"args.eval_interval={steps}", f"args.save_interval={steps}"),
        *(f"args.save={work}/runs", f"args.experiment_name={kind}", f"data.cache_dir={work}/cache"),
    ]


def start_of(work: Path, kind: str) -> tuple[str, str]:
    """Returns the words that choose the weights of the start."""
    if kind not in STARTED:
        return ("args.mode=pretrain", "args.load=null")
    return ("args.mode=finetune", f"args.load={folder_of(work, 'none')}")


def folder_of(work: Path, kind: str) -> Path:
    return sorted((work / "runs").glob(f"{kind}-*"))[-1]


def run(words: list[str], *, threads: int) -> None:
    """Runs a command to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def measure(work: Path, kind: str, *, steps: int, threads: int) -> Result:
    """Trains one kind and reads its held-out loss."""
    path = work / f"{kind}_{steps}.json"
    if not path.is_file():
        run(command("precompute", work, kind, steps), threads=threads)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        run([*command("train", work, kind, steps), "data.cache=require"], threads=threads)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        record = last_validation(folder_of(work, kind))
        losses = record["valid_loss_by_timestep"]
        result = Result(record["valid_loss"], losses, time.monotonic() - start, used)
        path.write_text(json.dumps(asdict(result), indent=1))
    return Result(**json.loads(path.read_text()))


def last_validation(folder: Path) -> dict:
    """Returns the last record of a run that has a validation loss."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "valid_loss" in record][-1]


def rows(results: dict[str, Result]) -> Iterator[str]:
    """Yields the lines of the table."""
    yield "| condition | held-out loss | of that without | t = 62 | 437 | 937 | seconds | core seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind, result in results.items():
        at = [f"{result.by_timestep[timestep]:.3f}" for timestep in ("62", "437", "937")]
        share = result.loss / compared_with(kind, results).loss
        times = f"{result.seconds:.0f} | {core_seconds(kind, results):.0f}"
        yield f"| {kind} | {result.loss:.4f} | {share:.2f} | {' | '.join(at)} | {times} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for data, cache and runs; default: a temporary one")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS][2:], default=[*KINDS][2:])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        compare(options.work or Path(temporary), options.kinds, steps=options.steps, threads=options.threads)


def compare(work: Path, kinds: Sequence[str], *, steps: int, threads: int) -> None:
    """Prints the table of several kinds, and those above the limits."""
    if not (work / "control").is_dir():
        tool = [sys.executable, str(ROOT / "tools/make_control_videos.py"), str(work / "control")]
        sizes = ["--train", str(TRAIN_CLIPS), "--valid", str(VALID_CLIPS)]
        run([*tool, "--sets", "mosaic", *sizes], threads=1)
    results = {"none": measure(work, "none", steps=steps, threads=threads)}
    print("\n".join(rows(results)), flush=True)
    for kind in kinds:
        for each in dict.fromkeys((STARTED.get(kind, kind), kind)):
            results[each] = measure(work, each, steps=steps, threads=threads)
            print([*rows(results)][-1], flush=True)
    if missed := [kind for kind in kinds if not is_learnt(kind, results)]:
        print(f"above the limits: {', '.join(missed)}")


def compared_with(kind: str, results: dict[str, Result]) -> Result:
    """Returns the result without condition: from as many steps, of the base included."""
    return results["none" if kind == "longer" else STARTED.get(kind, "none")]


def core_seconds(kind: str, results: dict[str, Result]) -> float:
    """Returns the time of a run, with that of its base."""
    return results[kind].core_seconds + (results["none"].core_seconds if kind in STARTED else 0)


def is_learnt(kind: str, results: dict[str, Result]) -> bool:
    """Returns whether a run reached the share of the loss within the time."""
    is_low = results[kind].loss <= MOST_SHARE * compared_with(kind, results).loss
    return is_low and core_seconds(kind, results) <= MOST_CORE_SECONDS


if __name__ == "__main__":
    main()
