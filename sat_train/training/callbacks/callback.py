"""What a side-concern of the loop may listen to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sat_train.training.entries import Entry

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer


class Callback:
    """Does nothing; override what is needed. Those that only rank 0 has must not call collectives."""

    def started(self, trainer: Trainer) -> None:
        """Before the first step."""

    def step_done(self, trainer: Trainer) -> None:
        """After each step."""

    def reported(self, entry: Entry) -> None:
        """There is a new entry."""

    def finished(self, trainer: Trainer) -> None:
        """After the last step, whether the run is complete or was asked to stop. Not after an error."""

    def closed(self) -> None:
        """At the very end, also after an error."""
