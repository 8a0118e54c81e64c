"""Runs of the embedded model on a few drawn clips, with an autoencoder of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from sat_train.config import RunConfig, load_run_config
from sat_train.models.vae.video_vae import VideoVAE
from tests.unit.data.videos import make_folder

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "sft.yaml"
# The embedded model on 5 frames, from random weights, with nothing but the loss at each step.
SMALL = (
    *("args.mode=pretrain", "args.load=null", "args.device=cpu", "args.num_workers=0", "args.warmup=0"),
    *("data.params.max_num_frames=5", "data.params.max_upscale=8", "args.tensorboard=false"),
    *("args.log_interval=1", "args.resume=none"),
)


def load_run(words: list[str], *, purpose: str = "train") -> RunConfig:
    return load_run_config([BASE], [*SMALL, *words], purpose=purpose)


def make_set(folder: Path, names: str) -> Path:
    """Writes clips of 3 seconds, one for each letter; each has its own pace of keyframes, every second one
    another aspect."""
    for number, name in enumerate(names):
        make_folder(folder, [name], num_frames=90, gop=10 + number, width=32 + 16 * (number % 2))
    return folder


def make_vae(path: Path, seed: int = 0) -> Path:
    """Writes random weights for the autoencoder of the embedded model, as a file of torch's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = VideoVAE(ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, z_channels=16, norm_num_groups=4)
    torch.save(vae.state_dict(), path)
    return path
