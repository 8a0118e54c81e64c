"""Prints what a day of training is worth, computed by `sat-train plan`'s formulas: nothing is measured.

python benchmarks/cost.py [--hardware h100]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sat_train.cli.main import run_cli
from sat_train.config import RunConfig, load_run_config
from sat_train.config.hardware import find_hardware
from sat_train.distributed.processes import start_single_process
from sat_train.planning.activations import settle
from sat_train.planning.planner import Plan, Planner

MODELS = ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b")
CACHED = ("data.cache=require", "data.cache_dir=cache", "args.valid_video_interval=null", "args.batch_size=1")
DAY_S = 86400


def row(model: str, recipe: str, plan: Plan, recomputed: str) -> str:
    """Returns a line of the table."""
    samples = plan.samples_per_second * DAY_S
    memory, hours = plan.peak.total / 1e9, plan.gpus * 24 / samples * 1000
    cells = (
        f"{model}, {recipe}",
        f"{plan.gpus}",
        recomputed,
        f"{memory:.0f}",
        f"{plan.step.total:.2f}",
        f"{plan.mfu:.0%}",
        f"{samples:,.0f}",
        f"{hours:.2g}",
    )
    return f"| {' | '.join(cells)} |"


def policy(config: RunConfig) -> str:
    """Returns what a run recomputes."""
    args = config.args
    return args.recompute if args.checkpoint_budget is None else f"budget {args.checkpoint_budget:g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", default="h100")
    card = find_hardware(parser.parse_args().hardware)
    start_single_process()
    configs = Path(__file__).resolve().parents[1] / "configs"
    columns = ("run", "GPUs", "recomputed", "GB", "s a step", "MFU", "samples in 24 hours")
    print(f"| {' | '.join((*columns, 'GPU-hours for 1,000 samples'))} |")
    print("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for gpus in (1, 8, 64):
            for recipe in ("sft", "lora") if gpus > 1 or model == "cogvideox_2b" else ("lora",):
                files = [configs / "model" / f"{model}.yaml", configs / f"{recipe}.yaml"]
                planner = Planner(card, gpus)
                config = load_run_config(files, CACHED, purpose="check", check_paths=False)
                config = settle(planner, config)
                print(row(model, recipe, planner.plan(config), policy(config)), flush=True)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
