"""Settings of the report on conditions."""

from __future__ import annotations

from pydantic import Field

from sat_train.config.parts.record import Record, Texts


class ConditionReportConfig(Record):
    """Worth of the conditions of held-out clips: losses with another clip's, without one, and moved."""

    conditions: Texts | None = Field(
        None,
        description="Conditions to report on: of `model.conditions`, `text`, `image`. null: all of "
        "`model.conditions`; []: none.",
    )
    every: int = Field(
        1, ge=1, description="One validation in so many has the report, and the last one of a run."
    )
    moves: bool = Field(
        True,
        description="Also move the condition by a latent frame and pixel: shows whether it is aligned.",
    )
    warn_after: int = Field(
        300, ge=0, description="Step from which a condition that is not used, or not aligned, is warned of."
    )
