"""Slot `module` (`model.modules.NAME`): network modules that act inside the transformer.

A builder gets the parameters and the `ModelSpec`, and returns a `Mixin` (`sat_train/models/dit/mixin.py`).
Its weights are `mixins.NAME.*`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params

TAKEN = (
    "pos_embed",
    "patch_embed",
    "adaln_layer",
    "final_layer",
    "lora",
)  # names of the package's own mixins


class ModuleParams(Params):
    """Base of the settings of a network module."""


class ModuleConfig(Choice):
    """A network module."""

    slot: ClassVar[str] = "module"

    target: str = Field(description="The module.")
    params: ModuleParams = Field(description="Its settings.")
