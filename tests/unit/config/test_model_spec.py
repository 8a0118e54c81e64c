"""The numbers of a model, and what follows from them, against the models themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sat_train.config import ModelSpec, load_run_config
from sat_train.config.geometry import Geometry
from sat_train.distributed.processes import start_single_process
from sat_train.errors import SatTrainError
from sat_train.models.build import build_dit
from sat_train.models.trainable import summarize_parameters

MODELS = sorted((Path(__file__).resolve().parents[3] / "configs/model").glob("*.yaml"))


def load(path: Path) -> ModelSpec:
    return load_run_config([path], purpose="check", check_paths=False).spec


def geometry(patch_t: int = 1) -> Geometry:
    return Geometry(patch=(patch_t, 2, 2), temporal_compression=4, spatial_compression=8)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_model_part_by_part(path: Path) -> None:
    start_single_process()
    spec = load(path)
    dit = build_dit(spec, device="meta", dtype=torch.bfloat16, with_adapters=False)
    assert spec.parameters() == summarize_parameters(dit).trainable


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_flops_are_those_that_pytorch_counts(path: Path) -> None:
    start_single_process()
    spec = load(path)
    dit = build_dit(spec, device="meta", dtype=torch.bfloat16, with_adapters=False)
    frames, height, width = spec.trained_latent
    latent = torch.empty(1, frames + spec.padding(frames), spec.in_channels, height, width, device="meta")
    text = torch.empty(1, spec.text.max_length, spec.text_width, device="meta")
    ofs = None if spec.ofs_width is None else torch.empty(1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dit(latent, torch.empty(1, device="meta"), text, ofs_b=ofs)
    tokens = dit.patch_grid(latent).tokens + spec.text.max_length
    attention = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" in str(operation) or "bmm" in str(operation)
    )
    assert spec.flops(tokens) == (counter.get_total_flops() - attention, attention)


def test_families_differ_in_patches_in_time() -> None:
    families = {path.stem: load(path).family for path in MODELS}
    assert {name for name, family in families.items() if family == "1.5"} == {
        "cogvideox1.5_5b",
        "cogvideox1.5_5b_i2v",
        "cogvideox1.5_tiny",
        "cogvideox1.5_tiny_i2v",
    }


def test_latents_of_the_familys_clips() -> None:
    assert [geometry().latent_frames(frames) for frames in (1, 5, 49, 81)] == [1, 2, 13, 21]
    latent = geometry(patch_t=2).latent(81, 768, 1360)
    assert (latent.frames, latent.padding, latent.height, latent.width) == (21, 1, 96, 170)
    assert geometry(patch_t=2).patches(latent) == 11 * 48 * 85


@pytest.mark.parametrize(
    ("frames", "nearest"), [(0, "1 and 5"), (4, "1 and 5"), (50, "49 and 53"), (80, "77 and 81")]
)
def test_other_counts_are_refused_with_the_nearest_ones(frames: int, nearest: str) -> None:
    with pytest.raises(
        SatTrainError, match=rf"^clip: {frames} frames do not fit[^$]*nearest counts are {nearest}"
    ):
        geometry().check_frames(frames, subject="clip")


@pytest.mark.parametrize(("height", "width"), [(24, 32), (32, 24), (0, 16), (16, -16)])
def test_sizes_that_patches_do_not_fill_are_refused(height: int, width: int) -> None:
    with pytest.raises(SatTrainError, match=rf"^sample: {height}x{width} pixels do not divide"):
        geometry().check_size(height, width, subject="sample")
    geometry().check_size(32, 48, subject="sample")


@pytest.mark.parametrize(
    ("latent", "patch_t", "pixels"),
    [(13, 1, 49), (12, 1, 45), (22, 2, 81), (21, 2, 81), (42, 2, 161), (1, 2, 1)],
)
def test_latent_counts_of_old_sampling_files(latent: int, patch_t: int, pixels: int) -> None:
    assert geometry(patch_t).pixel_frames(latent) == pixels


def test_channels_of_a_frame_are_the_encoders_in_and_the_decoders_out() -> None:
    path = "model.first_stage_config.params"
    words = [f"{path}.encoder_config.params.in_channels=4", f"{path}.decoder_config.params.out_ch=5"]
    coder = load_run_config(MODELS[:1], words, purpose="check", check_paths=False).spec.coder
    assert (coder.in_channels, coder.out_ch) == (4, 5)
