"""Warns of a condition that the model does not use, or that does not lie where the clip shows it."""

from __future__ import annotations

from sat_train.log import get_logger
from sat_train.training.loop.callback import Callback
from sat_train.training.loop.metrics import Metrics, ValidationMetrics

log = get_logger(__name__)

_REASONS = "docs/validation.md lists the usual causes"


class ConditionCheck(Callback):
    """Reads the condition report of each validation from a step on. Rank 0 only.

    Args:
        warn_after: First step of which it warns.
    """

    optional = True

    def __init__(self, warn_after: int) -> None:
        self._warn_after = warn_after

    def reported(self, metrics: Metrics) -> None:
        """Warns of each condition with a problem; of a wrong place at once, since no training mends it."""
        if not isinstance(metrics, ValidationMetrics):
            return
        for losses in metrics.conditions:
            problems = [*losses.misplaced()]
            if metrics.step >= self._warn_after:
                problems += losses.problems()
            for problem in problems:
                log.warning("step %d: %s; %s", metrics.step, problem, _REASONS)
