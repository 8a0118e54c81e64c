"""Slot `loss_term` (`model.loss_terms.NAME`): the terms of the training loss.

A builder gets the parameters and the `ModelSpec`, and returns a `LossTerm`
(`sat_train/objective/loss_term.py`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

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
