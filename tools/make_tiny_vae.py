"""Trains the tiny VAE of the embedded model and writes `sat_train/assets/tiny/vae.safetensors`.

    python tools/make_tiny_vae.py    # about 20 minutes on one CPU core; run it again to go on after a stop

Training clips are drawn (seeds the demo set does not use) and cut from the demo set's training split; its
validation split is only measured. Each step is a function of its number, so a stopped and resumed run equals
a straight one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from make_demo_videos import FIRST_FREE_SEED, draw_clip

from sat_train.models.vae.video_vae import VideoVAE

ASSETS = Path(__file__).resolve().parents[1] / "sat_train" / "assets"
FPS, NUM_FRAMES, HEIGHT, WIDTH = 8, 17, 64, 96
KL_WEIGHT = 1e-4
WARMUP_STEPS = 50
REAL_SHARE = 0.2
SHORT_SHARE, SHORT_FRAMES = 0.75, 9  # most steps take half a clip, the last ones all of it


def build_tiny_vae() -> VideoVAE:
    """The shape that `configs/model/cogvideox_tiny.yaml` names."""
    return VideoVAE(ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_num_groups=4)


def shrink(frames_thwc: np.ndarray) -> Tensor:
    """uint8 frames of any size to (t, c, 64, 96) in [-1, 1]."""
    frames = torch.from_numpy(frames_thwc).permute(0, 3, 1, 2).float()
    return F.interpolate(frames, (HEIGHT, WIDTH), mode="bilinear", antialias=True) / 127.5 - 1


def read_clip(path: Path, start_s: float = 0.0) -> Tensor:
    """17 frames at 8 frames a second from `start_s` on: (t, c, h, w) in [-1, 1]."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = np.array([t for t, _ in frames])
    wanted = start_s + np.arange(NUM_FRAMES) / FPS
    picked = np.clip(np.searchsorted(times, wanted + 1e-3, side="right") - 1, 0, len(frames) - 1)
    return shrink(np.stack([frames[i][1] for i in picked]))


def augment(video_tchw: Tensor, rng: random.Random) -> Tensor:
    """Mirrors, swaps colour channels and changes brightness and contrast."""
    flips = [dim for dim in (2, 3) if rng.random() < 0.5]
    video = video_tchw.flip(flips)[:, rng.sample(range(3), 3)]
    return (video * rng.uniform(0.8, 1.1) + rng.uniform(-0.15, 0.15)).clamp(-1, 1)


def training_clip(rng: random.Random, real_clips: Sequence[Path], num_frames: int) -> Tensor:
    """The clip of one training step, (t, c, h, w)."""
    if rng.random() < REAL_SHARE:
        video = read_clip(rng.choice(real_clips), rng.uniform(0, 1))
    else:
        seed = rng.randrange(FIRST_FREE_SEED, 10**9)
        video = shrink(draw_clip(seed, height=128, width=192, fps=FPS, num_frames=NUM_FRAMES)[0])
    start = rng.randint(0, NUM_FRAMES - num_frames)
    return augment(video[start : start + num_frames], rng)


def reconstruction_loss(vae: VideoVAE, video_btchw: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + MSE of a posterior sample's decoding, plus a little KL."""
    mean, logvar = vae.encode_moments(video_btchw)
    noise = torch.randn(mean.shape, generator=generator)
    error = vae.decode(mean + torch.exp(0.5 * logvar) * noise) - video_btchw
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


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


def train(vae: VideoVAE, *, steps: int, peak: float, state_path: Path) -> None:
    """Trains to `steps`, going on from `state_path` if it exists."""
    real_clips = sorted((ASSETS / "demo" / "train" / "videos").glob("bunny_*.mp4"))
    held_out = {
        path.stem: read_clip(path) for path in sorted((ASSETS / "demo" / "valid" / "videos").iterdir())
    }
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    first = 0
    if state_path.exists():
        state = torch.load(state_path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, smoothed = time.monotonic(), math.nan
    for step in range(first, steps):
        rng = random.Random(f"tiny vae step {step}")
        num_frames = SHORT_FRAMES if step < SHORT_SHARE * steps else NUM_FRAMES
        video = training_clip(rng, real_clips, num_frames)[None]
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        loss = reconstruction_loss(vae, video, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        smoothed = loss.item() if math.isnan(smoothed) else 0.97 * smoothed + 0.03 * loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"step {step + 1} loss {smoothed:.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 300 == 0 or step + 1 == steps:
            validate(vae, held_out)
            done = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(done, state_path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--state", type=Path, default=Path("tiny_vae_state.pt"), help="goes on from here if it exists"
    )
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny" / "vae.safetensors")
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = build_tiny_vae()
    train(vae, steps=options.steps, peak=options.learning_rate, state_path=options.state)

    vae.half().float()  # what a reader will get: the file holds fp16
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half() for name, weight in vae.state_dict().items()}, options.output)
    demo = [read_clip(path) for path in sorted((ASSETS / "demo" / "train" / "videos").iterdir())]
    std = latent_std(vae, demo)
    print(f"wrote {options.output}; latent std {std:.4f}: scale_factor {1 / std:.4f}")
    validate(
        vae, {path.stem: read_clip(path) for path in sorted((ASSETS / "demo" / "valid" / "videos").iterdir())}
    )


if __name__ == "__main__":
    main()
