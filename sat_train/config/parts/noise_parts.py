"""Slot `noise` (`noise_config` of the loss): the noise that training adds and sampling starts from.

A builder gets the parameters and the `ModelSpec`, and returns a `NoiseLaw`
(`sat_train/objective/noising.py`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params, part


class NoiseParams(Params):
    """Base of the settings of a noise law."""


class NoiseConfig(Choice):
    """Noise of training, and the first noise of sampling."""

    slot: ClassVar[str] = "noise"

    target: str = Field("Normal", description="Distribution of the noise.")
    params: NoiseParams = Field(description="Its settings.")


@part("noise", "Normal", build="sat_train.objective.noising:NoiseLaw")
class NormalParams(NoiseParams):
    """Unit normal numbers, each independent of all others."""
