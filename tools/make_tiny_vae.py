"""Trains the tiny VAE of the embedded model and writes `sat_train/assets/tiny/vae.safetensors`.

    python tools/make_tiny_vae.py    # about 20 minutes on one CPU core

Training clips are drawn (seeds the demo set does not use) and cut from the demo set's training split; its
validation split is only measured. First single images, many different ones a step, then longer and longer
clips: colours and edges need variety, which one clip a step does not have.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from make_demo_videos import FIRST_FREE_SEED, draw_clip

from sat_train.models.vae.causal import Downsample3D, ResnetBlock3D, SpatialNorm3D, Upsample3D
from sat_train.models.vae.video_vae import VideoVAE

ASSETS = Path(__file__).resolve().parents[1] / "sat_train" / "assets"
FPS, NUM_FRAMES, HEIGHT, WIDTH = 8, 17, 64, 96
KL_WEIGHT = 1e-4
WARMUP_STEPS = 20
DRAWN_CLIPS, FIRST_SEED = 150, FIRST_FREE_SEED + 9_999_000
REAL_STARTS_S = (0.0, 0.5, 0.9)


@dataclass(frozen=True)
class Stage:
    """Some steps of training, all with clips of one length."""

    num_frames: int
    batch_size: int
    steps: int


@dataclass(frozen=True)
class Cycle:
    """Stages under one cosine of the learning rates: Muon's for convolutions, Adam's for biases and norms."""

    matrix_lr: float
    vector_lr: float
    stages: tuple[Stage, ...]


CURRICULUM = (
    Cycle(0.02, 3e-3, (Stage(1, 12, 200), Stage(5, 4, 140), Stage(17, 1, 60), Stage(17, 2, 120))),
    Cycle(0.014, 2e-3, (Stage(9, 4, 160), Stage(17, 2, 80))),
)


def build_tiny_vae() -> VideoVAE:
    """The shape that `configs/model/cogvideox_tiny.yaml` names."""
    return VideoVAE(ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_num_groups=4)


def initialize(vae: VideoVAE) -> None:
    """Starts as a plain pyramid: residual branches silent, norms unconditioned, the posterior narrow."""
    torch.manual_seed(0)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, SpatialNorm3D):
            nn.init.normal_(module.conv_y.conv.weight, std=0.02)
            nn.init.ones_(module.conv_y.conv.bias)
            nn.init.normal_(module.conv_b.conv.weight, std=0.1)
        elif isinstance(module, ResnetBlock3D):
            nn.init.zeros_(module.conv2.conv.weight)
        elif isinstance(module, Downsample3D | Upsample3D):
            pass_through(module.conv, window=2 if isinstance(module, Downsample3D) else 1)
    nn.init.normal_(vae.encoder.conv_in.conv.bias, std=0.5)
    nn.init.constant_(vae.encoder.conv_out.conv.bias[vae.z_channels :], -8.0)


@torch.no_grad()
def pass_through(conv: nn.Conv2d, window: int) -> None:
    """Makes a square convolution nearly the mean over a window: the first pixels, or the middle one."""
    conv.weight.mul_(0.3)
    channel = torch.arange(conv.weight.shape[0])
    taps = [(0, 0), (0, 1), (1, 0), (1, 1)] if window == 2 else [(1, 1)]
    for y, x in taps:
        conv.weight[channel, channel, y, x] += 1 / len(taps)


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal: many times fewer steps than Adam here.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                memory = self.state[weight].setdefault("memory", torch.zeros_like(weight))
                memory.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonal((weight.grad + group["momentum"] * memory).flatten(1))
                stretch = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"] * stretch)


def orthogonal(matrix: Tensor) -> Tensor:
    """Brings all singular values near one, by five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def build_optimizers(vae: VideoVAE, matrix_lr: float, vector_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for convolutions, Adam for biases and norms; each group remembers its `peak` learning rate."""
    matrices = [weight for weight in vae.parameters() if weight.dim() > 1]
    vectors = [weight for weight in vae.parameters() if weight.dim() == 1]
    optimizers = [Muon(matrices, lr=matrix_lr), torch.optim.Adam(vectors, lr=vector_lr, betas=(0.9, 0.99))]
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]
    return optimizers


def to_unit(frames_thwc: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 frames of any size to (t, c, h, w) in [-1, 1]."""
    frames = torch.from_numpy(frames_thwc).permute(0, 3, 1, 2).float()
    return F.interpolate(frames, size, mode="bilinear", antialias=True) / 127.5 - 1


@functools.cache
def read_frames(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All frames of a file and their times in seconds."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return np.stack([frame for _, frame in frames]), np.array([time for time, _ in frames])


def read_clip(
    path: Path, start_s: float = 0.0, *, size: tuple[int, int] = (HEIGHT, WIDTH), num_frames: int = NUM_FRAMES
) -> Tensor:
    """Frames at 8 a second from `start_s` on: (t, c, h, w) in [-1, 1]."""
    frames, times = read_frames(path)
    wanted = start_s + np.arange(num_frames) / FPS
    picked = np.clip(np.searchsorted(times, wanted + 1e-3, side="right") - 1, 0, len(times) - 1)
    return to_unit(frames[picked], size)


def augment(video_tchw: Tensor, rng: random.Random) -> Tensor:
    """Mirrors, swaps colour channels and changes brightness and contrast."""
    flips = [dim for dim in (2, 3) if rng.random() < 0.5]
    video = video_tchw.flip(flips)[:, rng.sample(range(3), 3)]
    return (video * rng.uniform(0.8, 1.1) + rng.uniform(-0.15, 0.15)).clamp(-1, 1)


def clip_pool() -> Tensor:
    """All clips that training draws from, (clips, t, c, h, w)."""
    drawn = [
        to_unit(
            draw_clip(seed, height=2 * HEIGHT, width=2 * WIDTH, fps=FPS, num_frames=NUM_FRAMES)[0],
            (HEIGHT, WIDTH),
        )
        for seed in range(FIRST_SEED, FIRST_SEED + DRAWN_CLIPS)
    ]
    real_files = sorted((ASSETS / "demo" / "train" / "videos").glob("bunny_*.mp4"))
    return torch.stack(drawn + [read_clip(path, start_s) for path in real_files for start_s in REAL_STARTS_S])


def training_batch(pool: Tensor, stage: Stage, step: int) -> Tensor:
    """The clips of one step, (b, t, c, h, w)."""
    rng, clips = random.Random(step), []
    for _ in range(stage.batch_size):
        clip = pool[rng.randrange(len(pool))]
        start = rng.randint(0, NUM_FRAMES - stage.num_frames)
        clips.append(augment(clip[start : start + stage.num_frames], rng))
    return torch.stack(clips)


def reconstruction_loss(vae: VideoVAE, video_btchw: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + MSE of a posterior sample's decoding, plus a little KL."""
    mean, logvar = vae.encode_moments(video_btchw)
    noise = torch.randn(mean.shape, generator=generator)
    error = vae.decode(mean + torch.exp(0.5 * logvar) * noise) - video_btchw
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl


def share_of_peak(step: int, steps: int) -> float:
    """Learning rate in units of its peak: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def psnr_db(vae: VideoVAE, video_tchw: Tensor) -> float:
    """Of the decoded posterior mean, in dB against a range of 2."""
    decoded = vae.decode(vae.encode_moments(video_tchw[None])[0]).clamp(-1, 1)
    return 10 * math.log10(4 / (decoded[0] - video_tchw).square().mean().item())


def validate(vae: VideoVAE, clips: dict[str, Tensor]) -> float:
    """Prints and returns the mean PSNR over held-out clips."""
    scores = {name: psnr_db(vae, clip) for name, clip in clips.items()}
    mean = sum(scores.values()) / len(scores)
    worst = min(scores, key=scores.get)
    print(f"  held out: {mean:.2f} dB mean, worst {worst} {scores[worst]:.2f} dB", flush=True)
    return mean


@torch.no_grad()
def latent_std(vae: VideoVAE, clips: Sequence[Tensor]) -> float:
    """Standard deviation of posterior samples over the clips; its inverse is `scale_factor`."""
    generator = torch.Generator().manual_seed(0)
    latents = []
    for clip in clips:
        mean, logvar = vae.encode_moments(clip[None])
        latents.append(mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator))
    return torch.cat(latents).std().item()


def train(vae: VideoVAE) -> None:
    """Goes through the curriculum; each step is a function of its number."""
    pool, held_out = clip_pool(), read_clips("valid")
    first = 0
    for cycle in CURRICULUM:
        optimizers = build_optimizers(vae, cycle.matrix_lr, cycle.vector_lr)
        stages = [stage for stage in cycle.stages for _ in range(stage.steps)]
        for i, stage in enumerate(stages):
            loss = train_step(vae, optimizers, pool, stage, first + i, share_of_peak(i, len(stages)))
            if (i + 1) % 40 == 0 or i + 1 == len(stages):
                print(f"step {first + i + 1} loss {loss:.4f}", flush=True)
                validate(vae, held_out)
        first += len(stages)


def train_step(
    vae: VideoVAE,
    optimizers: Sequence[torch.optim.Optimizer],
    pool: Tensor,
    stage: Stage,
    step: int,
    share: float,
) -> float:
    """Makes one step at a share of the peak learning rates; returns its loss."""
    video = training_batch(pool, stage, step)
    loss = reconstruction_loss(vae, video, torch.Generator().manual_seed(step))
    vae.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = group["peak"] * share
        optimizer.step()
    return loss.item()


def read_clips(split: str) -> dict[str, Tensor]:
    """The start of every demo clip of a split."""
    return {path.stem: read_clip(path) for path in sorted((ASSETS / "demo" / split / "videos").iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny" / "vae.safetensors")
    options = parser.parse_args()
    vae = build_tiny_vae()
    initialize(vae)
    train(vae)

    vae.half().float()  # what a reader will get: the file holds fp16
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half() for name, weight in vae.state_dict().items()}, options.output)
    std = latent_std(vae, list(read_clips("train").values()))
    print(f"wrote {options.output}; latent std {std:.4f}: scale_factor {1 / std:.4f}")
    validate(vae, read_clips("valid"))


if __name__ == "__main__":
    main()
