"""Trains the embedded model by every recipe that changes training, and writes what to expect of each.

    python benchmarks/recipes.py [--write] [RECIPE ...]

It prints the table of docs/recipes.md, and writes with --write a card for each recipe
(`docs/recipes/<recipe>.json`: the held-out losses of three seeds by step, and the band of one more). It exits
with 1 if a recipe does not lower the held-out loss. Clips are small, so that a step costs little; all recipes
share one cache of samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sat_train.checkpoint.fragments import MASTER
from sat_train.checkpoint.layout import fragments_file_name
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.training.build import train
from sat_train.training.callbacks.metrics_file import NAME, read_metrics
from sat_train.training.callbacks.validation_file import read_validations
from sat_train.training.expected_curve import ExpectedCurve, write_card
from sat_train.training.loop.clip_losses import ClipLosses

CARDS = Path(__file__).resolve().parents[1] / "docs" / "recipes"
SEEDS = (1, 2, 3)
STEPS, INTERVAL = 300, 50

# Of every card: 300 steps with the recipe's own schedule, and 12 clips of 9 small frames.
WORDS = (
    f"args.train_iters={STEPS}",
    f"args.lr_decay_iters={STEPS}",  # the first steps alone have the same rates
    f"args.save_interval={STEPS}",
    f"args.eval_interval={INTERVAL}",
    "args.valid_video_interval=null",
    "args.batch_size=2",
    "args.eval_batch_size=4",
    "args.eval_iters=3",
    "args.eval_timesteps=8",
    "data.params.video_size=[32,48]",
    "data.params.max_num_frames=9",
    "data.params.views=1",
    "data.params.short_clip=shrink",
)
# Of this machine alone.
PLACE = ("args.device=cpu", "args.num_workers=0", "args.tensorboard=false", "args.log_interval=50")

SFT, LORA = "configs/sft.yaml", "configs/lora.yaml"


@dataclass(frozen=True)
class Recipe:
    """A recipe on the embedded model.

    Args:
        name: Name of its file in configs/recipe/.
        behind: The preset that it goes behind; empty for a recipe that names its own.
        words: What a model of this size needs otherwise: rates that suit 300 steps.
    """

    name: str
    behind: str
    words: tuple[str, ...] = ()

    @property
    def base(self) -> tuple[str, ...]:
        """Its configuration files."""
        return (*filter(None, [self.behind]), f"configs/recipe/{self.name}.yaml")

    @property
    def trains_adapters(self) -> bool:
        """Whether it trains a LoRA."""
        return self.behind == LORA or self.name.endswith("_lora")


# The first two are what the step times of the others are compared with. Left out: `style_lora` changes data
# and length alone, `ema` not the weights that train; `buckets` and `image_to_video` are about other data and
# another model.
RECIPES = (
    Recipe("sat_sft", "", ("args.lr=1e-4", "args.warmup=15")),
    Recipe("sat_lora", "", ("args.warmup=15",)),
    Recipe("diffusers_sft", SFT, ("args.lr=1e-4", "args.warmup=15")),
    Recipe("diffusers_lora", LORA, ("args.lr=4e-4", "args.warmup=15")),
    Recipe("low_vram_24gb", LORA, ("args.warmup=15",)),
    Recipe("low_vram_16gb", LORA, ("args.warmup=15",)),
    Recipe("min_snr", SFT, ("args.lr=1e-4", "args.warmup=15")),
    Recipe("prodigy", LORA, ("args.warmup=15",)),
    Recipe("came", SFT, ("args.lr=1e-4", "args.warmup=15")),
    Recipe("adafactor", SFT, ("args.lr=1e-2", "args.warmup=15")),
    Recipe("muon", SFT, ("args.lr=1e-4", "args.warmup=15")),
)


@dataclass(frozen=True)
class Result:
    """What one seed of a recipe gave.

    Args:
        validations: Losses by step.
        step_time_s: Median time of a step.
        state_bytes: Bytes of optimizer state for each weight that trains, as saved.
    """

    validations: dict[int, ClipLosses]
    step_time_s: float
    state_bytes: float


def load(recipe: Recipe, seed: int, folder: Path) -> RunConfig:
    """Returns the configuration of one seed."""
    words = [*WORDS, *recipe.words, *PLACE, f"args.seed={seed}", f"args.experiment_name={recipe.name}-{seed}"]
    words += [f"args.save={folder / 'runs'}", "data.cache=fill", f"data.cache_dir={folder / 'cache'}"]
    return load_run_config([*recipe.base], words)


def run(recipe: Recipe, seed: int, folder: Path) -> Result:
    """Trains one seed."""
    train(load(recipe, seed, folder), start_single_process())
    (run_directory,) = (folder / "runs").glob(f"{recipe.name}-{seed}-*")
    times = [record["step_time_s"] for record in read_metrics(run_directory / NAME) if "loss" in record]
    return Result(read_validations(run_directory), statistics.median(times[1:]), state_bytes(run_directory))


def state_bytes(run_directory: Path) -> float:
    """Returns the bytes of optimizer state for each weight that trains, in the last checkpoint."""
    saved = torch.load(run_directory / str(STEPS) / fragments_file_name(0), weights_only=True)
    weights = state = 0
    for fragment in saved["fragments"]:
        weights += fragment["tensors"].pop(MASTER).numel()
        state += sum(
            tensor.nbytes for tensor in [*fragment["tensors"].values(), *fragment["indivisible"].values()]
        )
    return state / weights


def row(recipe: Recipe, results: Sequence[Result], adam_s: float) -> tuple[str, bool]:
    """Returns the row of the table, and whether the held-out loss has fallen.

    Args:
        recipe: The recipe.
        results: One of each seed.
        adam_s: Time of a step with AdamW and the same weights in training.
    """
    first, last = (mean_over_seeds([result.validations[step] for result in results]) for step in (0, STEPS))
    loss, change = last.mean(), last.minus(first).mean()
    cells = (
        f"`{recipe.name}`",
        f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})",
        f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})",
        f"{step_time(results) / adam_s:.2f}",
        f"{results[0].state_bytes:.2g}",
    )
    return f"| {' | '.join(cells)} |", change.high < 0


def step_time(results: Iterable[Result]) -> float:
    """Returns the median time of a step over the seeds."""
    return statistics.median(result.step_time_s for result in results)


def mean_over_seeds(validations: Sequence[ClipLosses]) -> ClipLosses:
    """Returns the mean loss of each clip at each timestep."""
    clips = {}
    for clip in validations[0].clips:
        columns = zip(*(each.clips[clip] for each in validations), strict=True)
        clips[clip] = tuple(map(statistics.fmean, columns))
    return ClipLosses(validations[0].timesteps, clips)


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains the embedded model by every recipe.")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="none: all of them")
    parser.add_argument("--write", action="store_true", help="write the cards of docs/recipes/")
    options = parser.parse_args()
    rows, fallen, adam_s = [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for recipe in RECIPES:
            is_baseline = not recipe.behind
            if options.recipes and recipe.name not in options.recipes and not is_baseline:
                continue
            results = {seed: run(recipe, seed, Path(temporary)) for seed in SEEDS}
            if is_baseline:
                adam_s[recipe.trains_adapters] = step_time(results.values())
            card = ExpectedCurve.of_runs(
                recipe.name,
                base=recipe.base,
                words=(*WORDS, *recipe.words),
                runs={seed: result.validations for seed, result in results.items()},
            )
            if options.write:
                write_card(CARDS / f"{recipe.name}.json", card)
            text, has_fallen = row(recipe, [*results.values()], adam_s[recipe.trains_adapters])
            rows.append(text)
            fallen.append(has_fallen)
            print(text, flush=True)
    print("\n| recipe | held-out loss after 300 steps | change | time of a step | state, bytes a weight |")
    print("|---|---|---|---|---|", *rows, sep="\n")
    return 0 if all(fallen) else 1


if __name__ == "__main__":
    sys.exit(main())
