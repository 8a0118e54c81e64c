"""Slot `condition` (`model.conditions.NAME`): inputs of the model besides caption and image.

A builder gets the parameters and the `ModelSpec`, and returns a `Condition`
(`sat_train/encoding/conditions/condition.py`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params

TAKEN = ("clip", "text", "image", "ofs")  # names of the package's own encodings


class ConditionParams(Params):
    """Base of the settings of a condition."""


class ConditionConfig(Choice):
    """An input of the model."""

    slot: ClassVar[str] = "condition"

    target: str = Field(description="The condition.")
    params: ConditionParams = Field(description="Its settings.")
    drop: float = Field(0.0, ge=0, le=1, description="Share of the training samples in which it is dropped.")
