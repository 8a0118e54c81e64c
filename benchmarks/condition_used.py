"""Plants faults in a control, and counts what the report on conditions says of them and of sound runs.

    python benchmarks/condition_used.py --work /tmp/condition_used              # three faults, 20 sound runs
    python benchmarks/condition_used.py --work /tmp/condition_used --sound 3

Each run trains a narrow model from random weights for 300 steps on the `mosaic` set of
`tools/make_control_videos.py`, and validates every 100 steps; each sound run has a seed and held-out clips of
its own. A fault counts as found where a warning names it by the last step; any warning of a sound run is a
false alarm. Exits with 1 where a fault is missed or a sound run alarms. A run whose result stands in `--work`
is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
        "data.cache=require",
    ),
    *(f"model.network_config.params.{size}" for size in ("num_layers=2", "hidden_size=64")),
    "model.network_config.params.num_attention_heads=1",
)


@dataclass(frozen=True)
class Outcome:
    """What the report said of a run.

    Args:
        warnings: On the control, of all validations.
        true_minus_shuffled: Of the last one, with its 95 % interval.
        seconds: Of the run.
    """

    warnings: list[str]
    true_minus_shuffled: list[float]
    seconds: float


def outcome(work: Path, name: str, seed: int, steps: int, words: tuple[str, ...] = ()) -> Outcome:
    """Trains, unless it was done before, and returns what the run warns of."""
    path = work / f"{name.replace(' ', '_')}_{steps}.json"
    if not path.is_file():
        start = time.monotonic()
        warnings = train_once(work, path.stem, seed, steps, words)
        folder = sorted((work / "runs").glob(f"{path.stem}-*"))[-1]
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        report = [record["conditions"]["control"] for record in records if "conditions" in record][-1]
        result = Outcome(warnings, report["true_minus_shuffled"], time.monotonic() - start)
        path.write_text(json.dumps(asdict(result), indent=1))
    return Outcome(**json.loads(path.read_text()))


def train_once(work: Path, name: str, seed: int, steps: int, words: tuple[str, ...]) -> list[str]:
    """Trains, and returns the warnings on the control."""
    from sat_train.config import load_run_config
    from sat_train.distributed.processes import start_single_process
    from sat_train.encoding.precompute import precompute
    from sat_train.training.build import train

    data = work / "control/mosaic"
    run = [
        *("--extension", str(ROOT / "benchmarks/planted_faults"), *COMMON, *words),
        *(f"args.train_data=[{data}/train/manifest.jsonl]", f"args.valid_data=[{data}/valid/{seed}.jsonl]"),
        *(f"args.train_iters={steps}", f"args.eval_interval={max(1, steps // 3)}", f"args.seed={seed}"),
        *(f"args.save_interval={steps}", f"args.condition_report.warn_after={steps}"),
        *(f"args.save={work}/runs", f"args.experiment_name={name}", f"data.cache_dir={work}/cache"),
    ]
    config, mesh = load_run_config([str(ROOT / "configs/sft.yaml")], run), start_single_process()
    precompute(config, mesh)
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sat_train")
    logger.addHandler(handler)
    try:
        train(config, mesh)
    finally:
        logger.removeHandler(handler)
    return [line for line in lines if "the condition control" in line]


def measure(work: Path, *, sound: int, steps: int) -> Iterator[tuple[str, bool]]:
    """Yields a line for each run, and whether the report is right."""
    for name, (word, expected) in FAULTS.items():
        result = outcome(work, name, 0, steps, (word,))
        found = [line for line in result.warnings if expected in line]
        yield line_of(name, found[0] if found else "MISSED", result), bool(found)
    for seed in range(1, sound + 1):
        result = outcome(work, f"sound {seed}", seed, steps)
        yield line_of(f"sound {seed}", str(result.warnings or "no alarm"), result), not result.warnings


def line_of(name: str, verdict: str, result: Outcome) -> str:
    mean, low, high = result.true_minus_shuffled
    interval = f"true minus shuffled {mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"{name}: {verdict}; {interval} ({result.seconds:.0f} s)"


def make_set(work: Path, *, sound: int) -> None:
    """Makes the clips, unless they are there: those to train on are shared, each seed has held-out ones."""
    data = work / "control/mosaic"
    if not data.is_dir():
        tool = [sys.executable, str(ROOT / "tools/make_control_videos.py"), str(work / "control")]
        sizes = ["--train", str(TRAIN_CLIPS), "--valid", str(VALID_CLIPS * (sound + 1))]
        subprocess.run([*tool, "--sets", "mosaic", *sizes], check=True, stdout=subprocess.DEVNULL)
    rows = (data / "valid/manifest.jsonl").read_text().splitlines()
    for seed in range(len(rows) // VALID_CLIPS):
        own = rows[seed * VALID_CLIPS : (seed + 1) * VALID_CLIPS]
        (data / f"valid/{seed}.jsonl").write_text("\n".join(own) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data, cache and runs")
    parser.add_argument("--sound", type=int, default=20, help="runs without a fault")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    make_set(options.work, sound=options.sound)
    results = []
    for line, is_right in measure(options.work, sound=options.sound, steps=options.steps):
        print(line, flush=True)
        results.append(is_right)
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
