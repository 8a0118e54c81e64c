"""Plants faults in a control, and counts what the report on conditions says of them and of sound runs.

    python benchmarks/condition_used.py --work /tmp/condition_used              # three faults, 20 sound runs
    python benchmarks/condition_used.py --work /tmp/condition_used --sound 3

Each run trains a narrow model from random weights for 300 steps on the `mosaic` set of
`tools/make_control_videos.py`, with another seed, and validates every 100 steps. A fault counts as found
where a warning names it by the last step; any warning of a sound run is a false alarm. Exits with 1 where a
fault is missed or a sound run alarms.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TRAIN_CLIPS, VALID_CLIPS = 48, 16
FAULTS = {
    "not wired": ("model.modules.add.params.wired=false", "is not used"),
    "4 frames late": ("model.conditions.control.params.fault=shifted", "moved earlier"),
    "cropped 8 pixels off": ("model.conditions.control.params.fault=cropped", "moved "),
}
COMMON = (
    *("args.mode=pretrain", "args.load=null", "args.device=cpu", "args.batch_size=4", "args.num_workers=0"),
    *("args.lr=3e-3", "args.warmup=0.1", "args.clip_grad=1.0", "deepspeed.optimizer.params.betas=[0.9,0.99]"),
    *(
        "args.eval_iters=2",
        "args.eval_batch_size=8",
        "args.eval_timesteps=4",
        "args.valid_video_interval=null",
    ),
    *("args.tensorboard=false", "args.clip_ledger=false", "args.keep_last=1"),
    "data.params.views=1",
    *("data.fields.control.kind=video", "model.conditions.control.target=PlantedControl"),
    *(
        "model.conditions.control.params.into=extras",
        "model.modules.add.target=AddControl",
        "model.train.all.match=[.]",
        "data.cache=fill",
    ),
    "model.network_config.params.num_layers=2",
)


def warnings_of(work: Path, name: str, seed: int, steps: int, words: tuple[str, ...] = ()) -> list[str]:
    """Trains, and returns what the run warns of."""
    from sat_train.config import load_run_config
    from sat_train.distributed.processes import start_single_process
    from sat_train.training.build import train

    data = work / "control/mosaic"
    run = [
        *("--extension", str(ROOT / "benchmarks/planted_faults"), *COMMON, *words),
        *(f"args.train_data=[{data}/train/manifest.jsonl]", f"args.valid_data=[{data}/valid/manifest.jsonl]"),
        *(f"args.train_iters={steps}", f"args.eval_interval={max(1, steps // 3)}", f"args.seed={seed}"),
        *(f"args.save_interval={steps}", f"args.condition_report.warn_after={steps}"),
        *(f"args.save={work}/runs", f"args.experiment_name={name}", f"data.cache_dir={work}/cache"),
    ]
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sat_train")
    logger.addHandler(handler)
    try:
        train(load_run_config([str(ROOT / "configs/sft.yaml")], run), start_single_process())
    finally:
        logger.removeHandler(handler)
    return [line for line in lines if "the condition control" in line]


def measure(work: Path, *, sound: int, steps: int) -> Iterator[tuple[str, bool]]:
    """Yields a line for each run, and whether the report is right."""
    for name, (word, expected) in FAULTS.items():
        start = time.monotonic()
        said = warnings_of(work, name.split()[-1], 0, steps, (word,))
        found = [line for line in said if expected in line]
        yield f"{name}: {found[0] if found else 'MISSED'} ({time.monotonic() - start:.0f} s)", bool(found)
    for seed in range(1, sound + 1):
        start = time.monotonic()
        said = warnings_of(work, f"sound{seed}", seed, steps)
        yield f"sound run {seed}: {said or 'no alarm'} ({time.monotonic() - start:.0f} s)", not said


def make_set(work: Path, train_clips: int = TRAIN_CLIPS, valid_clips: int = VALID_CLIPS) -> None:
    """Makes the set of clips, unless it is there."""
    if not (work / "control").is_dir():
        tool = [sys.executable, str(ROOT / "tools/make_control_videos.py"), str(work / "control")]
        sizes = ["--train", str(train_clips), "--valid", str(valid_clips)]
        subprocess.run([*tool, "--sets", "mosaic", *sizes], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data, cache and runs")
    parser.add_argument("--sound", type=int, default=20, help="runs without a fault")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    make_set(options.work)
    results = []
    for line, is_right in measure(options.work, sound=options.sound, steps=options.steps):
        print(line, flush=True)
        results.append(is_right)
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
