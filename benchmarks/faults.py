"""Breaks training at random moments in random ways, resumes it, and prints what was lost.

    python benchmarks/faults.py                       # 300 trials
    python benchmarks/faults.py --trials 20 --seed 7 --keep /tmp/failed

Each trial trains two layers of the tiny model on two ranks (full or LoRA, ZeRO 1 to 3, filling a cache; half
of the recipes save in the background) while one thing goes wrong, then resumes it as a person would. Laws: no
run hangs; a resumed run ends with the losses and weights of one that nothing happened to; at most one save
interval is done twice (three where the disk refuses saves; one more where saves are in the background); the
cause is named, without a traceback. Exit code 1 when a law was broken. The disk can only be filled up where
this user may mount a tmpfs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fault_parts.ranks import WarmRanks
from benchmarks.fault_parts.trials import (
    RECIPES,
    Recipe,
    Reference,
    Verdict,
    draw_fault,
    make_reference,
    run_trial,
)


def run_trials(
    count: int, *, seed: int, root: Path, recipes: Sequence[Recipe] = RECIPES
) -> Iterator[Verdict]:
    """Runs trials one after the other; recipes take turns, and fault and moment are random.

    Args:
        count: How many.
        seed: Of the draws. The moment is drawn in seconds, so that two runs strike at about the same place.
        root: A folder for them; what passed is deleted.
        recipes: What is trained.
    """
    warm, references = WarmRanks(), dict[Recipe, Reference]()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        recipe = recipes[number % len(recipes)]
        if recipe not in references:
            references[recipe] = make_reference(
                warm, recipe, root / f"reference-{recipe.method}-{recipe.stage}"
            )
        reference = references[recipe]
        moment_s = chance.uniform(0, reference.seconds)
        trial_folder = root / f"trial-{number}"
        verdict = run_trial(warm, recipe, draw_fault(chance), moment_s, trial_folder, reference)
        shutil.rmtree(trial_folder, ignore_errors=True)
        yield verdict


def table(verdicts: Sequence[Verdict]) -> str:
    """Returns one line for each kind of fault."""
    lines = [f"{'fault':<26}{'trials':>7}{'broken laws':>13}{'most steps lost':>17}"]
    for kind in sorted({verdict.kind for verdict in verdicts}):
        chosen = [verdict for verdict in verdicts if verdict.kind == kind]
        broken = sum(bool(verdict.problems) for verdict in chosen)
        lost = max(verdict.steps_lost for verdict in chosen)
        lines.append(f"{kind:<26}{len(chosen):>7}{broken:>13}{lost:>17}")
    broken = sum(bool(verdict.problems) for verdict in verdicts)
    lines.append(f"{'all':<26}{len(verdicts):>7}{broken:>13}{max(v.steps_lost for v in verdicts):>17}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the output of trials that broke a law")
    options = parser.parse_args()
    verdicts = []
    with tempfile.TemporaryDirectory() as root:
        for number, verdict in enumerate(run_trials(options.trials, seed=options.seed, root=Path(root))):
            verdicts.append(verdict)
            result = "; ".join(verdict.problems) or "kept"
            recipe = f"{verdict.recipe.method} ZeRO-{verdict.recipe.stage}"
            print(
                f"{number:>4} {verdict.kind:<26} {recipe:<12} {verdict.moment_s:5.1f} s  {result}", flush=True
            )
            if verdict.problems and options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{number}.log").write_text(verdict.output, encoding="utf-8")
    print(table(verdicts))
    return int(any(verdict.problems for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
