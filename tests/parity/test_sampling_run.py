"""Whole guided runs, prompt to pixels, against diffusers' pipelines with the same weights and seeds."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
)
from torch import Tensor

from sat_train.diffusion.constant_guidance import ConstantGuidance
from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.diffusion.dynamic_guidance import DynamicGuidance
from sat_train.diffusion.guidance import Guidance
from sat_train.distributed.processes import start_single_process
from tests.parity.families import FAMILIES, Family
from tests.parity.models import SHIFT_SCALE, pipeline_pair

PROMPTS = ["a red square", "a blue circle moves to the left"]
SEEDS = [3, 4]
STEPS = 10
SCHEDULERS = {sample_ddim: CogVideoXDDIMScheduler, sample_dpmpp_2m: CogVideoXDPMScheduler}

# fp32 sums in another order, carried through 10 steps; relative to the largest value
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_process() -> None:
    start_single_process()


def _size(family: Family) -> dict[str, int]:
    """Of a video in pixels: as pre-trained where the positions ask for it, with latent padding for 1.5."""
    frames, height, width = family.latent_size
    if family.patch_frames > 1:
        frames, height, width = 3, 8, 6
    return {"num_frames": (frames - 1) * 4 + 1, "height": height * 8, "width": width * 8}


def _images(family: Family) -> Tensor | None:
    size = _size(family)
    shape = (len(PROMPTS), 3, size["height"], size["width"])
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randint(256, shape, generator=generator, dtype=torch.uint8) if family.image_to_video else None
    )


def _theirs(
    family, transformer, vae, encode, *, sampler, spacing, guidance: Guidance
) -> tuple[Tensor, Tensor]:
    """Returns diffusers' latent without padding and its pixels in [0, 1], (b, t, c, h, w)."""
    scheduler = SCHEDULERS[sampler](
        snr_shift_scale=SHIFT_SCALE,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
    )
    cls = CogVideoXImageToVideoPipeline if family.image_to_video else CogVideoXPipeline
    pipe = cls(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    image = {"image": _images(family).float() / 255} if family.image_to_video else {}
    decoded = {}

    def decode(latents: Tensor) -> Tensor:
        decoded["latents"] = latents
        return CogVideoXPipeline.decode_latents(pipe, latents)

    pipe.decode_latents = decode
    text = torch.stack([encode(prompt) for prompt in PROMPTS])
    video = pipe(
        **image,
        **_size(family),
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        num_inference_steps=STEPS,
        guidance_scale=guidance.scale,
        use_dynamic_cfg=isinstance(guidance, DynamicGuidance),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).frames
    return decoded["latents"], video


def _compare(family, monkeypatch, *, sampler, guidance, spacing="trailing") -> None:
    pipeline, transformer, vae = pipeline_pair(family.narrow())
    family = family.narrow()
    options = {"sampler": sampler, "guidance": guidance, "spacing": spacing}
    their_latent, their_video = _theirs(family, transformer, vae, pipeline.encoders.text, **options)
    decode, seen = pipeline.encoders.decode, []
    monkeypatch.setattr(pipeline.encoders, "decode", lambda latent: seen.append(latent) or decode(latent))
    video = pipeline.generate(
        PROMPTS, image_bchw=_images(family), steps=STEPS, seeds=SEEDS, **_size(family), **options
    )
    latent = seen[0] * pipeline.scale_factor
    assert latent.shape == their_latent.shape
    assert (latent - their_latent).abs().max() <= TOLERANCE * their_latent.abs().max()
    assert video.dtype == torch.uint8
    assert video.shape == their_video.shape
    assert video.float().std() > 5, "a flat picture would agree with anything"
    # a value on the edge between two levels may round to either
    assert (video.float() - their_video * 255).abs().max() <= 0.51


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpmpp_2m])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_guided_run_samples_the_video_of_diffusers(family, sampler, monkeypatch):
    _compare(family, monkeypatch, sampler=sampler, guidance=ConstantGuidance(6.0))


@pytest.mark.parametrize("family", [FAMILIES[1], FAMILIES[4]], ids=lambda family: family.name)
def test_dynamic_guidance(family, monkeypatch):
    _compare(family, monkeypatch, sampler=sample_dpmpp_2m, guidance=DynamicGuidance(6.0))


def test_linspace_spacing(monkeypatch):
    _compare(
        FAMILIES[0], monkeypatch, sampler=sample_ddim, guidance=ConstantGuidance(6.0), spacing="linspace"
    )
