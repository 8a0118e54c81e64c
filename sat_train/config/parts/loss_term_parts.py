"""Slot `loss_term` (`model.loss_terms.NAME`): the terms of the training loss.

A builder gets the parameters and the `ModelSpec`, and returns a `LossTerm`
(`sat_train/objective/loss_term.py`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sat_train.config.parts.reference import ConditionName
from sat_train.config.parts.registry import Choice, Params, part

DIFFUSION, DIFFUSION_TERM = "diffusion", "Diffusion"  # reserved for the error of the model's own prediction


class LossTermParams(Params):
    """Base of the settings of a loss term.

    Attributes:
        needs_reference: It calls `reference_v`: the model needs adapters, which are then switched off.
        needs_pairs: It compares a clip with those that lost against it: a condition must give these.
        decodes: It calls `decode`: training loads the autoencoder, also where all samples are cached.
    """

    needs_reference: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    decodes: ClassVar[bool] = False


class LossTermConfig(Choice):
    """A term of the training loss."""

    slot: ClassVar[str] = "loss_term"

    target: str = Field(DIFFUSION_TERM, description="The term.")
    params: LossTermParams = Field(description="Its settings.")
    weight: float = Field(
        1.0, ge=0, description="Factor on the term; 0 leaves it out of the loss, and logs it all the same."
    )


@part("loss_term", DIFFUSION_TERM, build="sat_train.objective.loss_term:DiffusionError")
class DiffusionErrorParams(LossTermParams):
    """Mean squared error of v, with the weights of min-SNR: the model's own loss, `diffusion`."""


@part("loss_term", "MaskedError", build="sat_train.objective.terms:MaskedError")
class MaskedErrorParams(LossTermParams):
    """The error of v where a mask is set, as a mean over the whole latent; min-SNR does not act on it."""

    condition: ConditionName = Field(description="The condition that holds the mask.")
    tensor: str = Field("mask", description="Its encoding that is the mask, [t, 1, h, w], from 0 to 1.")
    outside: bool = Field(False, description="Count where the mask is not set.")


@part("loss_term", "Preference", build="sat_train.objective.terms:Preference")
class PreferenceParams(LossTermParams):
    """Diffusion-DPO (arXiv:2311.12908): clips against the videos of a condition such as PreferencePairs.

    The reference is the model without its adapters. min-SNR does not act on it.
    """

    needs_reference = True
    needs_pairs = True

    beta: float = Field(5000.0, gt=0, description="Strength; 2500 to 5000 in the papers.")
