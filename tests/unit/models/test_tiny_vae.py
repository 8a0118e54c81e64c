"""The shipped VAE: what it promises about clips it never saw."""

import math

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sat_train.config import load_run_config
from sat_train.config.paths import ASSETS
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.tiling import Tiling
from sat_train.models.vae.video_vae import VideoVAE

VIDEOS = sorted((ASSETS / "demo" / "valid" / "videos").glob("*.mp4"))
FPS, NUM_FRAMES, SIZE = 8, 17, (64, 96)
CONFIG = ["configs/model/cogvideox_tiny.yaml"]


def read_clip(path) -> torch.Tensor:
    """The first 17 frames at 8 a second, (t, c, h, w) in [-1, 1]."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = np.array([time for time, _ in frames])
    wanted = np.searchsorted(times, np.arange(NUM_FRAMES) / FPS + 1e-3, side="right") - 1
    pixels = torch.from_numpy(np.stack([frames[i][1] for i in wanted])).permute(0, 3, 1, 2)
    return F.interpolate(pixels.float(), SIZE, mode="bilinear", antialias=True) / 127.5 - 1


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    spec = load_run_config(base=CONFIG, purpose="check").spec
    return build_vae(spec, state_dict=load_file(ASSETS / "tiny" / "vae.safetensors"))


@pytest.fixture(scope="module")
def clips(vae) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each held-out clip with the mean of its posterior."""
    videos = {path.stem: read_clip(path) for path in VIDEOS}
    return {name: (video, vae.encode_moments(video[None])[0]) for name, video in videos.items()}


def psnr_db(video: torch.Tensor, decoded: torch.Tensor) -> float:
    return 10 * math.log10(4 / (decoded.clamp(-1, 1) - video).square().mean().item())  # range 2, squared


def test_held_out_clips_come_back_at_22_db(vae, clips):
    scores = {name: psnr_db(video, vae.decode(mean)[0]) for name, (video, mean) in clips.items()}
    assert len(scores) == 12
    assert sum(scores.values()) / len(scores) >= 22, scores


def test_latents_times_scale_factor_have_about_unit_variance(clips):
    """The noise schedule is made for that; a tenth more or less does not matter to it."""
    scale_factor = load_run_config(base=CONFIG, purpose="check").model.scale_factor
    means = torch.cat([mean for _, mean in clips.values()])
    assert (scale_factor * means).std().item() == pytest.approx(1, abs=0.1)


def test_tiles_cost_less_than_a_decibel(vae, clips):
    """Tiles see their own group-norm statistics, so tiled differs from whole; how much is bounded here.

    Tiles of three quarters of the picture with a third of overlap: the decoded pictures agree to 26 dB,
    better than either agrees with the clip, and the reconstruction loses less than 1 dB.
    """
    video, mean = clips[VIDEOS[0].stem]
    whole = vae.decode(mean)[0]
    vae.tiling = Tiling(height=48, width=72, overlap_height=16, overlap_width=24)
    try:
        tiled = vae.decode(mean)[0]
        reconstructed = vae.decode(vae.encode_moments(video[None])[0])[0]
    finally:
        vae.tiling = None
    assert psnr_db(whole.clamp(-1, 1), tiled) >= 26
    assert psnr_db(video, reconstructed) >= psnr_db(video, whole) - 1
