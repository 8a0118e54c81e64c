"""Slot `condition` (`model.conditions.NAME`): inputs of the model besides caption and image.

A builder gets the parameters and the `ModelSpec`, and returns a `Condition`
(`sat_train/encoding/conditions/condition.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params

TAKEN = ("clip", "text", "image", "ofs")  # names of the package's own encodings


class ConditionParams(Params):
    """Base of the settings of a condition.

    Attributes:
        takes_image_slot: It takes the place of the first frame of image-to-video models.
    """

    takes_image_slot: ClassVar[bool] = False

    def channels(self, model: Any) -> int:
        """Returns the channels that it places next to the latent: the patch embedding is widened by them.

        Args:
            model: The `ModelSpec`.
        """
        return 0


class ConditionConfig(Choice):
    """An input of the model."""

    slot: ClassVar[str] = "condition"

    target: str = Field(description="The condition.")
    params: ConditionParams = Field(description="Its settings.")
    drop: float = Field(0.0, ge=0, le=1, description="Share of the training samples in which it is dropped.")
