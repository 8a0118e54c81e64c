"""Runs `make demo`: fine-tunes the embedded tiny model on the demo clips, then samples videos from it.

The last lines name the checkpoint, the videos and how the validation loss moved. Every command is printed, so
that it can be typed again and changed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

SAVE = Path("runs/demo")
SAMPLES = Path("samples/demo")
STEPS = 300
LEARNING_RATE = 3e-4  # configs/sft.yaml has 1e-5, right for 1000 steps and more
PROMPTS = (
    "a red star moves right on a blue background",
    "a yellow disc grows on a purple background",
    "the sun rises over green hills",
)


def run(command: list[str]) -> None:
    """Prints a command, runs it, and stops this script with its exit code when it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def validation_losses(run_directory: Path) -> list[float]:
    """Returns the validation losses of a run, oldest first."""
    lines = (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["valid_loss"] for entry in map(json.loads, lines) if "valid_loss" in entry]


def main() -> None:
    train_words = [
        *("--base", "configs/sft.yaml", f"args.save={SAVE}", f"args.train_iters={STEPS}"),
        *("args.save_interval=150", "args.eval_interval=150", "args.valid_video_interval=300"),
        *("args.log_interval=20", f"deepspeed.optimizer.params.lr={LEARNING_RATE}"),
    ]
    run(["torchrun", "launch/train_video.py", *train_words])
    run_directory = max(SAVE.iterdir(), key=lambda path: path.stat().st_mtime)
    prompt_file = run_directory / "prompts.txt"
    prompt_file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    sample_words = [
        *("--base", "configs/sample.yaml", f"args.load={run_directory}", f"args.output_dir={SAMPLES}"),
        *("args.input_type=txt", f"args.input_file={prompt_file}"),
    ]
    run(["torchrun", "launch/sample_video.py", *sample_words])
    losses = validation_losses(run_directory)
    step = (run_directory / "latest").read_text(encoding="utf-8").strip()
    print(f"\ncheckpoint       {run_directory / step}")
    for video in sorted(SAMPLES.rglob("*.mp4")):
        print(f"sample           {video}")
    print(f"validation loss  {losses[0]:.4f} before -> {losses[-1]:.4f} after {STEPS} steps")


if __name__ == "__main__":
    main()
