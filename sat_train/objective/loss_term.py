"""The base of loss terms, the model's own, and the weighted sum of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_train.objective.loss_inputs import LossInputs


class LossTerm:
    """One term of the training loss. It owns no weight that trains: those belong to a network module.

    Args:
        params: The part's parameter record.
        model: The model's description.
    """

    def __init__(self, params: Any = None, model: Any = None) -> None:
        self.params, self.model = params, model

    def __call__(self, step: LossInputs) -> Tensor:
        """Returns the loss of each row of the batch, or of each sample, float32 `[b]`, unweighted.

        Where preference pairs make several rows of a sample, the losers' rows of the result do not count.
        Every rank makes the same calls, whatever the samples are: multiply by a mask instead of skipping.
        """
        raise NotImplementedError


class DiffusionError(LossTerm):
    """The error of the model's own prediction, with the weights of min-SNR."""

    def __call__(self, step: LossInputs) -> Tensor:
        """Returns the weighted error of each row."""
        error_b = step.v_error_b(step.v_pred_btchw)
        return error_b if step.min_snr_b is None else error_b * step.min_snr_b


@dataclass(frozen=True)
class WeightedTerm:
    """A term of the loss with its weight.

    Args:
        term: The term.
        weight: Factor on it, at least 0; at 0 it is computed without gradient, and only reported.
        needs_reference: It reads the prediction without adapters.
    """

    term: LossTerm
    weight: float = 1.0
    needs_reference: bool = False

    def errors(self, step: LossInputs, *, name: str) -> Tensor:
        """Returns the unweighted loss of each sample, `[b]`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
            loss_b = self.term(step)
        rows, samples = len(step.timesteps_b), step.num_samples
        is_one_each = loss_b.shape in {(rows,), (samples,)}
        assert is_one_each, f"loss term {name}: shape {tuple(loss_b.shape)}, not ({rows},) or ({samples},)"
        return loss_b[:samples].float()


def weighted_sum(errors: Mapping[str, Tensor], terms: Mapping[str, WeightedTerm]) -> Tensor:
    """Returns the loss of each sample: the sum of its errors times their weights, `[b]`."""
    weighted = [terms[name].weight * loss_b for name, loss_b in errors.items() if terms[name].weight > 0]
    assert weighted, "a loss has a term whose weight is above 0"
    return torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]
