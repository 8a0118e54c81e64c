"""Validation losses with one condition replaced, and what they say about it: is it used, is it aligned?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sat_train.training.loop.clip_losses import ClipLosses, Estimate

SHUFFLED, DROPPED = "shuffled", "dropped"
# A move that gains less than this share of what the condition gains is no sign of a wrong alignment: what has
# no place of its own, such as a reference image, hardly notices a move.
_LEAST_SHARE = 0.05
_LEAST_GAIN = 0.1  # of correlation: what is aligned loses by a move, what has no place hardly notices it


@dataclass(frozen=True)
class ConditionLosses:
    """Losses of one validation with the true condition and with others: same clips, noise and timesteps.

    Args:
        name: The condition.
        true: Losses with the condition of the clip itself.
        dropped: Losses without the condition.
        shuffled: Losses with that of another clip of its shape; None where no clip has such a partner.
        moved: Losses with the condition moved in time or space, by move, perhaps at fewer timesteps.
        alignment: By move, how much better the condition's latent correlates with the clip's where it is
            moved: a number of each clip that does not depend on the weights (`alignment.py`).
    """

    name: str
    true: ClipLosses
    dropped: ClipLosses
    shuffled: ClipLosses | None
    moved: Mapping[str, ClipLosses]
    alignment: Mapping[str, ClipLosses] = field(default_factory=dict)

    def minus_shuffled(self) -> ClipLosses | None:
        """Returns the true loss minus the shuffled one, by clip: below zero where the condition is used."""
        return None if self.shuffled is None else self.true.minus(self.shuffled)

    def minus_dropped(self) -> ClipLosses:
        """Returns the true loss minus the one without the condition, by clip."""
        return self.true.minus(self.dropped)

    @cached_property
    def over_shuffled(self) -> Estimate | None:
        """Mean of the true loss minus the shuffled one, with its interval."""
        difference = self.minus_shuffled()
        return None if difference is None else difference.mean()

    @cached_property
    def over_dropped(self) -> Estimate:
        """Mean of the true loss minus the one without the condition, with its interval."""
        return self.minus_dropped().mean()

    @cached_property
    def over_moved(self) -> dict[str, Estimate]:
        """Mean of the true loss minus the moved one, by move: below zero where the condition is aligned."""
        return {
            move: self.true.at(losses.timesteps).minus(losses).mean() for move, losses in self.moved.items()
        }

    def misplaced(self) -> str | None:
        """Returns in one sentence where the condition lies wrongly, whatever the weights are."""
        gains = {move: numbers.mean() for move, numbers in self.alignment.items()}
        found = {m: g for m, g in gains.items() if g.has_interval and g.low > 0 and g.mean > _LEAST_GAIN}
        if not found:
            return None
        move, gain = max(found.items(), key=lambda item: item[1].mean)
        return (
            f"the condition {self.name} does not lie where the clip shows it: moved {move} by one place "
            f"of the latent it agrees better, correlation {gain.mean:+.2f} ({gain.low:+.2f} to "
            f"{gain.high:+.2f})"
        )

    def unused(self) -> str | None:
        """Returns in one sentence that the condition is not used; None where it is, or clips are too few."""
        used = self.over_shuffled
        if used is None or not used.has_interval or used.high < 0:
            return None
        how = "the same" if used.low <= 0 else "lower"
        return (
            f"the condition {self.name} is not used: the loss with another clip's is {how} "
            f"(true minus shuffled {_interval(used)})"
        )

    def misaligned(self) -> str | None:
        """Returns in one sentence that a used condition is read at the wrong place; None: nothing says so."""
        used, better = self.over_shuffled, self.better_move()
        if used is None or not used.has_interval or used.high >= 0 or better is None:
            return None
        move, gain = better
        return (
            f"the condition {self.name} is not aligned with the clip: moved {move} the loss is lower by "
            f"{gain.mean:.3g} ({gain.low:.3g} to {gain.high:.3g}); true minus shuffled is {_interval(used)}"
        )

    def better_move(self) -> tuple[str, Estimate] | None:
        """Returns the move that lowers the loss most beyond doubt, and what it gains; None: there is none."""
        if self.shuffled is None:
            return None
        found = []
        for move, gain in self.over_moved.items():
            timesteps = self.moved[move].timesteps
            worth = -self.true.at(timesteps).minus(self.shuffled.at(timesteps)).mean().mean
            if gain.has_interval and gain.low > 0 and gain.mean > _LEAST_SHARE * worth:
                found.append((gain.mean, move))
        return (max(found)[1], self.over_moved[max(found)[1]]) if found else None

    def as_json(self) -> dict[str, Any]:
        """Returns the differences as a part of a record of `metrics.jsonl`."""
        shuffled = self.minus_shuffled()
        return {
            "true_minus_shuffled": _limits(self.over_shuffled),
            "true_minus_dropped": _limits(self.over_dropped),
            "true_minus_shuffled_by_timestep": {} if shuffled is None else _by_timestep(shuffled),
            "true_minus_dropped_by_timestep": _by_timestep(self.minus_dropped()),
            "alignment_gain": {move: _limits(numbers.mean()) for move, numbers in self.alignment.items()},
            "true_minus_moved": {move: _limits(each) for move, each in self.over_moved.items()},
        }


def _by_timestep(difference: ClipLosses) -> dict[int, list[float] | None]:
    return {timestep: _limits(estimate) for timestep, estimate in difference.by_timestep().items()}


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3g} ({estimate.low:+.3g} to {estimate.high:+.3g})"


def _limits(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [estimate.mean, estimate.low, estimate.high]
