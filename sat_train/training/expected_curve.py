"""Expected-curve cards: the held-out losses of a recipe over several seeds, and the band of one more run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sat_train.errors import DataError
from sat_train.files import read_text, reading, write_text
from sat_train.training.loop.clip_losses import ClipLosses

# Two-sided 95 % points of Student's t, by the number of seeds.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
_ROUNDING = 1e-3  # least half-width as a share of the loss: other machines round in another order
_MOST_BYTES = 2**20

Verdict = Literal["below", "inside", "above"]


@dataclass(frozen=True)
class ExpectedCurve:
    """Validation losses of a recipe on the embedded model.

    Args:
        recipe: Its name.
        base: Its configuration files.
        words: Overrides of the command line, without the seed.
        seeds: Seeds of the runs.
        clips: The validation clips.
        timesteps: The timesteps at which they are measured.
        losses: Validation losses by step, one of each seed.
    """

    recipe: str
    base: tuple[str, ...]
    words: tuple[str, ...]
    seeds: tuple[int, ...]
    clips: tuple[str, ...]
    timesteps: tuple[int, ...]
    losses: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        assert len(self.seeds) in _T, f"a band of {len(self.seeds)} seeds"
        assert all(len(losses) == len(self.seeds) for losses in self.losses.values())

    @classmethod
    def of_runs(
        cls,
        recipe: str,
        *,
        base: tuple[str, ...],
        words: tuple[str, ...],
        runs: Mapping[int, Mapping[int, ClipLosses]],
    ) -> ExpectedCurve:
        """Makes the card of runs that differ in their seed alone.

        Args:
            recipe: Name of the recipe.
            base: Its configuration files.
            words: Overrides of the command line, without the seed.
            runs: Validations of each run, by seed and step.
        """
        curves = list(runs.values())
        first = next(iter(curves[0].values()))
        losses = {step: tuple(curve[step].mean().mean for curve in curves) for step in curves[0]}
        return cls(recipe, base, words, tuple(runs), tuple(first.clips), first.timesteps, losses)

    def band(self, step: int) -> tuple[float, float]:
        """Returns the 95 % prediction interval of the loss of one more seed at a step."""
        losses, count = self.losses[step], len(self.seeds)
        mean = math.fsum(losses) / count
        half = _T[count] * statistics.stdev(losses) * math.sqrt(1 + 1 / count)
        half = max(half, _ROUNDING * abs(mean))
        return mean - half, mean + half

    def place(self, step: int, loss: float) -> Verdict:
        """Places a loss in the band of a step; one that is not finite is above."""
        low, high = self.band(step)
        if loss < low:
            return "below"
        return "inside" if loss <= high else "above"

    def check_comparable(self, losses: ClipLosses, *, where: Path) -> None:
        """Compares clips and timesteps with those of a run.

        Raises:
            DataError: They differ, so that the losses cannot be compared.
        """
        if set(losses.clips) == set(self.clips) and losses.timesteps == self.timesteps:
            return
        raise DataError(
            f"{where}: validated {len(losses)} clips at {len(losses.timesteps)} timesteps that are not those "
            f"of the card of {self.recipe}",
            expected=f"the {len(self.clips)} clips of the card, at its timesteps {list(self.timesteps)}",
            remedy=f"train as the card does: --base {' '.join(self.base)} {' '.join(self.words)}",
        )


def write_card(path: Path, card: ExpectedCurve) -> None:
    """Writes a card as JSON.

    Raises:
        OSError: It cannot be written.
    """
    bands = {step: [round(limit, 6) for limit in card.band(step)] for step in card.losses}
    write_text(path, json.dumps({**asdict(card), "bands": bands}, indent=1) + "\n")


def read_card(path: Path) -> ExpectedCurve:
    """Reads a card.

    Raises:
        DataError: It is missing, or not a card.
    """
    expected = "a card of docs/recipes/, or a run directory with validation.jsonl"
    with reading(path, error=DataError, expected=expected, remedy="check the path"):
        card = json.loads(read_text(path, limit=_MOST_BYTES))
        return ExpectedCurve(
            recipe=str(card["recipe"]),
            base=tuple(map(str, card["base"])),
            words=tuple(map(str, card["words"])),
            seeds=tuple(map(int, card["seeds"])),
            clips=tuple(map(str, card["clips"])),
            timesteps=tuple(map(int, card["timesteps"])),
            losses={int(step): tuple(map(float, losses)) for step, losses in card["losses"].items()},
        )
