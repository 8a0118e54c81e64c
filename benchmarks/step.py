"""Compares a cached step of training with a plain torch loop of the same model, which takes turns with it.

    python benchmarks/step.py [--rounds 5] [--steps 100] [key.path=value ...]

Everything that a run does at a step is in its time: loader, draws, log, metrics. The plain loop knows a
forward, a backward, clipping and AdamW, on one batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rounds(folder: Path, count: int, steps: int, words: list[str]) -> list[dict[str, list[float]]]:
    """Fills a cache, trains from it, and returns the times of each round."""
    base = ["--base", "configs/sft.yaml"]
    run = [
        *(
            f"args.save={folder}/runs",
            f"data.cache_dir={folder}/cache",
            f"args.train_iters={steps * (count + 1)}",
        ),
        *("args.eval_interval=null", "args.valid_video_interval=null", "args.save_interval=1000000"),
        f"args.callbacks.plain={{target: PlainLoop, params: {{steps: {steps}}}}}",
    ]
    command = [*base, "--extension", str(ROOT / "benchmarks/plain_loop"), *run, *words]
    for script, use in (("precompute", "fill"), ("train_video", "require")):
        subprocess.run(
            [sys.executable, f"launch/{script}.py", *command, f"data.cache={use}"], cwd=ROOT, check=True
        )
    (lines,) = (folder / "runs").glob("*/plain_loop.jsonl")
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("words", nargs="*", default=[], help="more of the command line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = rounds(Path(folder), options.rounds, options.steps, options.words)
    for index, clock in enumerate(("of the clock", "of the process")):
        ours, plain = ([each[name][index] for each in times] for name in ("ours", "plain"))
        ratios = [a / b for a, b in zip(ours, plain, strict=True)]
        times_ms = (f"{statistics.median(each) * 1e3:.1f}" for each in (ours, plain))
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{clock}: {' ms a step, plain loop '.join(times_ms)} ms; ratio {spread}")


if __name__ == "__main__":
    main()
