"""Warnings of what a run shows while it trains, which no setting tells beforehand."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sat_train.log import get_logger

log = get_logger(__name__)

# Each is in the table of docs/validation.md, in these words.
RUN_WARNINGS: Mapping[str, str] = {
    "conditions_lie_where_clips_show_them": "A condition whose latent agrees better with the clip's where it "
    "is moved or squeezed.",
    "conditions_are_used": "A condition with which the held-out loss is no better than with another clip's.",
    "conditions_are_aligned": "A condition that lowers the held-out loss where it is moved.",
    "weights_get_gradients": "Weights that train, but have no gradient in the first backward pass; new ones "
    "whose gradient is still zero after two updates.",
}


class RunWarnings:
    """Warns by name, unless the name is silenced.

    Args:
        silenced: `args.silence`.
    """

    def __init__(self, silenced: Collection[str] = ()) -> None:
        self._silenced = frozenset(silenced)

    def warn(self, name: str, message: str) -> None:
        """Logs a message that ends with how to hide it.

        Args:
            name: One of `RUN_WARNINGS`.
            message: A sentence on this run.
        """
        assert name in RUN_WARNINGS, name
        if name not in self._silenced:
            log.warning("%s (args.silence=[%s] hides this)", message, name)
