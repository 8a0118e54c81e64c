"""Warns of a condition that the model does not use, or that does not lie where the clip shows it."""

from __future__ import annotations

from collections.abc import Iterator

from sat_train.config.run_warnings import RunWarnings
from sat_train.training.loop.callback import Callback
from sat_train.training.loop.condition_losses import ConditionLosses
from sat_train.training.loop.metrics import Metrics, ValidationMetrics

_REASONS = "docs/validation.md lists the usual causes"


class ConditionCheck(Callback):
    """Reads the condition report of each validation from a step on. Rank 0 only.

    Args:
        warn_after: First step of which it warns.
        warnings: Where it warns.
    """

    optional = True

    def __init__(self, warn_after: int, warnings: RunWarnings) -> None:
        self._warn_after = warn_after
        self._warnings = warnings

    def reported(self, metrics: Metrics) -> None:
        """Warns of each condition with a problem; of a wrong place at once, since no training mends it."""
        if not isinstance(metrics, ValidationMetrics):
            return
        for losses in metrics.conditions:
            for name, problem in self._problems(losses, metrics.step):
                self._warnings.warn(name, f"step {metrics.step}: {problem}; {_REASONS}")

    def _problems(self, losses: ConditionLosses, step: int) -> Iterator[tuple[str, str]]:
        if (problem := losses.misplaced()) is not None:
            yield "conditions_lie_where_clips_show_them", problem
        if step < self._warn_after:
            return
        if (problem := losses.unused()) is not None:
            yield "conditions_are_used", problem
        elif (problem := losses.misaligned()) is not None:
            yield "conditions_are_aligned", problem
