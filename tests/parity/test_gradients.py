"""One training step against a plain diffusers training step, for all parameters of all family members."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from torch import Tensor

from sat_train.data.batches import SampleBatch, VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.encode import Encode
from sat_train.objective.training_inputs import TrainingInputs
from sat_train.weights.diffusers_keys import transformer_to_diffusers
from tests.parity.families import FAMILIES, Family
from tests.parity.models import SHIFT_SCALE, pipeline_pair
from tests.parity.test_transformer import Rotary

# fp32 sums in another order, and theirs weights the error of x0 with up to 1 / (1 - alpha_bar) = 393
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_process() -> None:
    start_single_process()


def _batch(family: Family) -> SampleBatch:
    frames, height, width = (3, 8, 6) if family.patch_frames > 1 else family.latent_size
    shape = (2, (frames - 1) * 4 + 1, 3, height * 8, width * 8)
    generator = torch.Generator().manual_seed(5)
    videos = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    captions = ("a red square", "a blue circle")
    return SampleBatch(
        tuple(
            VideoSample(caption, index, shape[1], video, caption, None, AugmentationKey(0, index))
            for index, video, caption in zip((6, 7), videos, captions, strict=True)
        )
    )


def _their_loss(family: Family, transformer: CogVideoXTransformer3DModel, inputs: TrainingInputs) -> Tensor:
    """The training step of diffusers' CogVideoX trainers: the error of x0, weighted.

    Source: zai-org/CogVideo@7a1af71 `finetune/models/cogvideox_i2v/lora_trainer.py` compute_loss.
    """
    scheduler = CogVideoXDPMScheduler(
        snr_shift_scale=SHIFT_SCALE, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    x0, timesteps = inputs.x0_btchw, inputs.timesteps_b
    noisy = scheduler.add_noise(x0, inputs.eps_btchw, timesteps)
    image = inputs.dit.image_latent_btchw
    hidden = noisy if image is None else torch.cat([noisy, image], dim=2)
    rotary = None
    if family.positions != "sincos":
        rotary = Rotary(transformer).tables(x0.shape[1], *x0.shape[3:])
    v_pred = transformer(
        hidden_states=hidden,
        encoder_hidden_states=inputs.dit.text_bld,
        timestep=timesteps,
        ofs=torch.full((1,), 2.0) if family.ofs else None,
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    x0_pred = scheduler.get_velocity(v_pred, noisy, timesteps)
    weight = 1 / (1 - scheduler.alphas_cumprod[timesteps])
    weight = weight.view(-1, 1, 1, 1, 1)
    return torch.mean((weight * (x0_pred - x0) ** 2).reshape(len(x0), -1), dim=1).mean()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_loss_and_gradients_of_one_step(family):
    family = family.narrow()
    pipeline, transformer, _ = pipeline_pair(family)
    inputs = pipeline.training_inputs(Encode(pipeline.encoders, pipeline.conditions)(_batch(family)))
    output = pipeline.loss(inputs)
    output.loss.backward()
    their_loss = _their_loss(family, transformer, inputs)
    their_loss.backward()
    torch.testing.assert_close(output.loss.double(), their_loss.double(), rtol=TOLERANCE, atol=0)

    gradients = {name: parameter.grad for name, parameter in pipeline.dit.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    ours = transformer_to_diffusers(gradients, learned_positions=family.positions == "rotary_learned")
    theirs = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    if family.positions == "rotary_learned":
        theirs["patch_embed.pos_embedding"] = transformer.patch_embed.pos_embedding.grad
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).abs().max())
        # a gradient that is zero by symmetry is rounding noise on both sides: measured against the whole step
        assert error <= TOLERANCE * max(float(gradient.abs().max()), 1e-3 * scale), name
