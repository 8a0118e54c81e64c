"""Compares a cached step of training with other loops of the same model, which take turns with it.

    python benchmarks/step.py [--rounds 5] [--steps 100] [--sat] [key.path=value ...]

Everything that a run does at a step is in its time: loader, draws, log, metrics. The others know a forward, a
backward, clipping and AdamW, on one batch: a plain torch loop, and with `--sat` the step of SAT's trainer
(`sat.training.deepspeed_training`) with ZeRO-2 as CogVideo configures it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sat_train.cli.main import run_cli
from sat_train.cli.options import positive

ROOT = Path(__file__).resolve().parents[1]


def rounds(
    folder: Path, count: int, steps: int, *, sat: bool, words: list[str]
) -> list[dict[str, list[float]]]:
    """Fills a cache, trains from it, and returns the times of each round."""
    base = ["--base", "configs/sft.yaml"]
    run = [
        *(
            f"args.save={folder}/runs",
            f"data.cache_dir={folder}/cache",
            f"args.train_iters={steps * (count + 1)}",
        ),
        *("args.eval_interval=null", "args.valid_video_interval=null", "args.save_interval=1000000"),
        f"args.callbacks.plain={{target: PlainLoop, params: {{steps: {steps}, sat: {str(sat).lower()}}}}}",
    ]
    command = [*base, "--extension", str(ROOT / "benchmarks/plain_loop"), *run, *words]
    for script, use in (("precompute", "fill"), ("train_video", "require")):
        done = subprocess.run(
            [sys.executable, f"launch/{script}.py", *command, f"data.cache={use}"], cwd=ROOT, check=False
        )
        if done.returncode:
            raise SystemExit(done.returncode)  # it has said why
    (lines,) = (folder / "runs").glob("*/plain_loop.jsonl")
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive(int, 1000), default=5)
    parser.add_argument("--steps", type=positive(int, 100_000), default=100, help="of a round")
    parser.add_argument("--sat", action="store_true", help="let SAT's trainer take a turn, too")
    parser.add_argument("words", nargs="*", default=[], help="more of the command line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = rounds(Path(folder), options.rounds, options.steps, sat=options.sat, words=options.words)
    for index, clock in enumerate(("of the clock", "of the process")):
        for other in ("plain", "sat")[: 1 + options.sat]:
            print(f"{clock}: {compare(times, other, index)}")


def compare(times: list[dict[str, list[float]]], other: str, clock: int) -> str:
    """Returns the line of one other loop: milliseconds of both, and the ratio of each round."""
    ours, theirs = ([each[name][clock] for each in times] for name in ("ours", other))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ms = [f"{statistics.median(each) * 1e3:.1f} ms" for each in (ours, theirs)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return f"{ms[0]} a step, {other} {ms[1]}; ratio {spread}"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
