"""The loss terms that come with the package, besides the model's own."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from sat_train.encoding.conditions.latent_time import pad_in_time
from sat_train.objective.loss_inputs import LossInputs
from sat_train.objective.loss_term import LossTerm


class MaskedError(LossTerm):
    """The error of v where a mask is set, as a mean over the whole latent.

    Source: Bian et al. 2025 (arXiv:2503.05639, VideoPainter) section 3.2.
    """

    def __call__(self, step: LossInputs) -> Tensor:
        """Returns the error of each row; 0 where its mask is empty."""
        mask_btchw = step.encoded[self.params.condition][self.params.tensor].to(step.x0_btchw)
        if mask_btchw.shape[1] < step.x0_btchw.shape[1]:
            mask_btchw = pad_in_time(mask_btchw, self.model)
        return step.v_error_b(step.v_pred_btchw, weight=1 - mask_btchw if self.params.outside else mask_btchw)


class Preference(LossTerm):
    """Diffusion-DPO: the model improves on the winner more than on those that lost against it.

    With several losers it is the mean over them.

    Source: Wallace et al. 2023 (arXiv:2311.12908) equation 14, with the constant weight of its code.
    """

    def __call__(self, step: LossInputs) -> Tensor:
        """Returns the loss of each sample; log 2 where the model is its reference."""
        own_bn = step.groups(step.v_error_b(step.v_pred_btchw))
        reference_bn = step.groups(step.v_error_b(step.reference_v()))
        gain_bn = own_bn - reference_bn
        margin_bn = gain_bn[:, :1] - gain_bn[:, 1:]  # below 0 where the winner has improved more
        return -logsigmoid(-0.5 * self.params.beta * margin_bn).mean(1)
