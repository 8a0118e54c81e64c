"""Inputs of the terms of a loss: prediction, target, and what they were computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sat_train.diffusion.loss import min_snr_weight, v_mse_per_sample
from sat_train.diffusion.parameterization import add_noise, v_target, x0_from_v
from sat_train.distributed.transfer import to_device
from sat_train.encoding.conditions.condition import Encoding
from sat_train.encoding.conditions.randomness import SampleRandomness
from sat_train.errors import SatTrainError
from sat_train.objective.noising import Noising
from sat_train.objective.training_inputs import TrainingInputs


class Outputs(dict[str, Tensor]):
    """Outputs that modules kept in `forward.outputs`, by name."""

    def __missing__(self, name: str) -> Tensor:
        raise SatTrainError(
            f"a loss term reads the output '{name}', which no module keeps; "
            f"kept are {', '.join(self) or 'none'}",
            expected="a module whose `tap` sets forward.outputs[name]",
            remedy="name that module in model.loss_terms, or add it to model.modules",
        )


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch after the forward pass, for loss terms; on the device, but for timesteps.

    A sample is one row, except with preference pairs: then the rows are all winners, then each sample's first
    loser, and so on. Rows of one sample have the same noise, timestep and inputs of conditions.

    Args:
        x0_btchw: Scaled latent of the clips, padded in time, float32.
        eps_btchw: Noise of the same shape.
        x_t_btchw: The noised latent, float32.
        timesteps_b: The samples' timesteps, int64, on the CPU.
        levels_bt: Timestep of each latent frame, int64, on the CPU, -1 where it is clean; None: the sample's.
        alpha_bar_b: Share of the signal in the variance at `timesteps_b`, float64, on the CPU.
        noise_alpha_bar: The same on the device, of each frame's level, `[b, t]`; without levels `[b]`.
        v_pred_btchw: The prediction, float32, with gradient.
        v_true_btchw: Its target.
        counted_bt: True at latent frames that count in the loss, bool; None: all of them.
        encoded: Encodings of the conditions by name, batch first, before drop-out.
        outputs: What modules kept in `forward.outputs`, by name.
        random: Random numbers of the rows.
        num_samples: Samples of the micro-batch.
        min_snr_b: Weights of min-SNR, float32; None where they are not in use.
        reference: The prediction without adapters; None where no term has asked for it.
        decode_latent: See `decode`.
    """

    x0_btchw: Tensor
    eps_btchw: Tensor
    x_t_btchw: Tensor
    timesteps_b: Tensor
    levels_bt: Tensor | None
    alpha_bar_b: Tensor
    noise_alpha_bar: Tensor
    v_pred_btchw: Tensor
    v_true_btchw: Tensor
    counted_bt: Tensor | None
    encoded: Mapping[str, Encoding]
    outputs: Mapping[str, Tensor]
    random: SampleRandomness
    num_samples: int
    min_snr_b: Tensor | None
    reference: Tensor | None
    decode_latent: Callable[[Tensor, tuple[int, int] | None], Tensor]

    def v_error_b(self, v_btchw: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the mean squared error of a velocity in each row, over the frames that count, `[b]`.

        This is the x0 error of the papers with its weight 1 / (1 - alpha_bar), so their factors carry over.
        The weights of min-SNR are not applied: multiply by `min_snr_b` where they should be.

        Args:
            v_btchw: Velocities, any float dtype.
            weight: Factor on the squares, `[b, t, 1, h, w]` or a shape that broadcasts; the mean is over all
                elements, whatever their weights.
        """
        return v_mse_per_sample(v_btchw, self.v_true_btchw, self.counted_bt, weight)

    def reference_v(self) -> Tensor:
        """Returns the prediction of the model without its adapters, from the same inputs, without gradient.

        The record of the term says `needs_reference = True`: the prediction is made before the model's own.
        """
        assert self.reference is not None, "the record of a term that needs the reference says so"
        return self.reference

    def x0_pred(self) -> Tensor:
        """Returns the clean latent that the prediction implies, scaled and padded as `x0_btchw`."""
        return x0_from_v(self.x_t_btchw, self.v_pred_btchw, self.noise_alpha_bar)

    def decode(self, latent_btchw: Tensor, frames: tuple[int, int] | None = None) -> Tensor:
        """Decodes a latent to pixels, with gradient through the frozen autoencoder.

        The record of the term says `decodes = True`. The activations of the decoder are kept for the
        backward pass: a range of few frames bounds their memory.

        Args:
            latent_btchw: Scaled and padded in time, as `x0_btchw`.
            frames: First latent frame, and the one behind the last, without the padding of 1.5 in front. They
                are decoded as a clip of their own, 4 k + 1 pixel frames of k + 1 latent ones. None: all.

        Returns:
            Pixels in [-1, 1], not clamped, float32 `[b, frames, 3, height, width]`.
        """
        return self.decode_latent(latent_btchw, frames)

    def groups(self, x_b: Tensor) -> Tensor:
        """Returns numbers of rows by sample, `[b, 1 + losers]`: the winner's first."""
        groups_bn: Tensor = x_b.unflatten(0, (-1, self.num_samples)).transpose(0, 1)
        return groups_bn


def build_loss_inputs(
    inputs: TrainingInputs,
    noising: Noising,
    predict: Callable[..., Any],
    *,
    reference: Callable[[Tensor], Tensor] | None,
    with_outputs: bool,
    min_snr_gamma: float | None,
    decode_latent: Callable[[Tensor, tuple[int, int] | None], Tensor],
) -> LossInputs:
    """Runs the network once, and before it, where a term asks for it, once without adapters.

    Args:
        inputs: All inputs of the loss but the weights.
        noising: The noise schedule.
        predict: Predicts v from the noised latent; with `return_outputs` (v, outputs).
        reference: Predicts v without adapters and without gradient; None: no term asks for it.
        with_outputs: A term may read the outputs of modules.
        min_snr_gamma: Upper limit of the loss weight; None for no limit.
        decode_latent: See `LossInputs.decode`.
    """
    x0, eps, levels_bt = inputs.x0_btchw, inputs.eps_btchw, inputs.levels_bt
    alpha_bar_b = noising.signal(inputs.timesteps_b)
    noise_alpha_bar = alpha_bar_b if levels_bt is None else noising.signal(levels_bt)
    noise_alpha_bar = to_device(noise_alpha_bar, x0.device)
    x_t = add_noise(x0, eps, noise_alpha_bar)
    # before the prediction: ZeRO-3 expects a backward after a forward with gradient
    reference_v = None if reference is None else reference(x_t)
    v_pred, outputs = predict(x_t, return_outputs=True) if with_outputs else (predict(x_t), {})
    v_pred = v_pred.float()
    min_snr_b = None if min_snr_gamma is None else min_snr_weight(alpha_bar_b, min_snr_gamma)
    return LossInputs(
        x0_btchw=x0,
        eps_btchw=eps,
        x_t_btchw=x_t,
        timesteps_b=inputs.timesteps_b,
        levels_bt=levels_bt,
        alpha_bar_b=alpha_bar_b,
        noise_alpha_bar=noise_alpha_bar,
        v_pred_btchw=v_pred,
        v_true_btchw=v_target(x0, eps, noise_alpha_bar),
        counted_bt=inputs.counted_bt,
        encoded=inputs.encoded,
        outputs=Outputs(outputs),
        random=inputs.random,
        num_samples=inputs.num_samples,
        min_snr_b=None if min_snr_b is None else to_device(min_snr_b, x0.device),
        reference=reference_v,
        decode_latent=decode_latent,
    )
