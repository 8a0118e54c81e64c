"""Slot `view` (`args.validation_views.NAME`): what a validation says of held-out clips besides their loss.

A builder gets the parameters and the `ModelSpec`, and returns a `ValidationView`
(`sat_train/objective/validation_view.py`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params


class ViewParams(Params):
    """Base of the settings of a validation view."""


class ViewConfig(Choice):
    """A view of the held-out clips."""

    slot: ClassVar[str] = "view"

    target: str = Field(description="The view.")
    params: ViewParams = Field(description="Its settings.")
    clips: int = Field(2, ge=0, description="Held-out clips of which it shows pictures, from the first on.")
