"""Every shipped model file gives a pipeline and sampling settings with the released numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sat_train.config import load_run_config
from sat_train.diffusion.constant_guidance import ConstantGuidance
from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.diffusion.dynamic_guidance import DynamicGuidance
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.build import build_encoders
from sat_train.models.build import build_dit
from sat_train.objective.build import build_alpha_bar, build_pipeline
from sat_train.sampling.build import build_sampling

CONFIGS = Path(__file__).parents[3] / "configs"

# scale factor, factor of the image latent, ofs, SNR shift, dtype, frames, size
RELEASED = {
    "cogvideox_2b": (1.15258426, None, None, 3.0, torch.float16, 49, (480, 720)),
    "cogvideox_5b": (0.7, None, None, 1.0, torch.bfloat16, 49, (480, 720)),
    "cogvideox_5b_i2v": (0.7, 0.7, None, 1.0, torch.bfloat16, 49, (480, 720)),
    "cogvideox1.5_5b": (0.7, None, None, 1.0, torch.bfloat16, 81, (768, 1360)),
    "cogvideox1.5_5b_i2v": (0.7, 1 / 0.7, 2.0, 1.0, torch.bfloat16, 81, (768, 1360)),
}


def _load(name: str, *words: str):
    base = [CONFIGS / "model" / f"{name}.yaml", CONFIGS / "sample.yaml"]
    return load_run_config(
        base, ["args.prompt=x", "args.image=x.png", *words], purpose="sample", check_paths=False
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_numbers(name):
    scale_factor, image_scale, ofs, shift, dtype, frames, size = RELEASED[name]
    config = _load(name)
    start_single_process()
    dit = build_dit(config.spec, device="meta", dtype=torch.float32)
    pipeline = build_pipeline(config, dit=dit, encoders=build_encoders(config, torch.device("cpu")))
    conditions = {condition.name: condition for condition in pipeline.conditions}
    assert pipeline.scale_factor == scale_factor
    assert ("image" in conditions) == name.endswith("i2v")
    if image_scale is not None:
        assert conditions["image"].scale == pytest.approx(image_scale)
    assert (conditions["ofs"].value if "ofs" in conditions else None) == ofs
    assert pipeline.dtype == dtype
    snr = pipeline.alpha_bar / (1 - pipeline.alpha_bar)
    assert snr[0].item() == pytest.approx((1 / 0.00085 - 1) / shift, rel=1e-9)
    settings = build_sampling(config)
    assert (settings.num_frames, (settings.height, settings.width)) == (frames, size)
    assert (settings.sampler, settings.steps) == (sample_dpmpp_2m, 50)
    assert settings.guidance == DynamicGuidance(6.0, 5.0)


def test_arguments_win_over_the_model():
    config = _load(
        "cogvideox1.5_5b",
        "args.sampling_num_frames=22",
        "args.sampling_image_size=[96,64]",
        "args.sampling_steps=7",
        "args.guidance_scale=3",
        "args.sampler=DDIM",
    )
    settings = build_sampling(config)
    assert (settings.num_frames, settings.height, settings.width) == (81, 96, 64)
    assert (settings.steps, settings.sampler, settings.guidance) == (
        7,
        sample_ddim,
        DynamicGuidance(3.0, 5.0),
    )


def test_constant_guidance_and_an_odd_schedule():
    config = _load(
        "cogvideox_2b",
        "model.sampler_config.params.guider_config.target=ConstantGuidance",
        "model.sampler_config.params.guider_config.params={scale: 2.5}",
        "model.denoiser_config.params.discretization_config.params.keep_start=true",
    )
    assert build_sampling(config).guidance == ConstantGuidance(2.5)
    assert build_alpha_bar(config.spec)[0].item() == pytest.approx(1 - 0.00085, rel=1e-12)
