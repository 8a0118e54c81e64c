"""Measures the training time of the shipped presets on this machine: seconds a step, and minutes for 1000
steps.

    python benchmarks/train.py [--steps 200] [--preset configs/sft.yaml ...] [key.path=value ...]

Validation and checkpoints are off: this is the time of training itself, decoding included. The first steps
are left out: they load and compile.
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
WARM_STEPS = 20


def step_entries(preset: str, steps: int, words: list[str]) -> list[dict[str, float]]:
    """Trains `steps` steps and returns the entries of `metrics.jsonl` after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            *(f"args.save={folder}", f"args.train_iters={steps}", "args.log_interval=10", "args.warmup=10"),
            *("args.eval_interval=null", "args.valid_video_interval=null", f"args.save_interval={steps}"),
        ]
        command = [sys.executable, "launch/train_video.py", "--base", preset, *fixed, *words]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if "step_time_s" in entry and entry["step"] > WARM_STEPS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--preset", nargs="+", default=["configs/sft.yaml", "configs/lora.yaml"])
    parser.add_argument("words", nargs="*", default=[], help="more of the command line")
    options = parser.parse_args()
    print(f"{'preset':24} {'s/step':>8} {'data s':>8} {'1000 steps':>11} {'GiB':>6}")
    for preset in options.preset:
        entries = step_entries(preset, options.steps, options.words)
        step_s = statistics.median(entry["step_time_s"] for entry in entries)
        data_s = statistics.median(entry["data_wait_s"] for entry in entries)
        memory = max(entry["peak_memory_gib"] for entry in entries)
        print(f"{preset:24} {step_s:8.3f} {data_s:8.3f} {step_s * 1000 / 60:8.1f} min {memory:6.2f}")


if __name__ == "__main__":
    main()
