"""Pre-trains the tiny transformer of an embedded model and writes the weights that its `args.load` names.

    python tools/make_tiny_dit.py --work /tmp/tiny_dit     # run again to continue where it stopped
    python tools/make_tiny_dit.py --work /tmp/dit_1.5 --model configs/model/cogvideox1.5_tiny.yaml --minutes 4

It sees drawn clips only, none of the demo data set's, so that fine-tuning on the demo clips is a true
fine-tune. Latents and text embeddings are computed once and kept in `--work`. The running average of the
weights is what is shipped, in half precision.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.nn.functional as F
from make_demo_videos import FIRST_FREE_SEED, draw_clip
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat_train.config import RunConfig, load_run_config
from sat_train.config.paths import expand_assets
from sat_train.data.batches import StepPosition
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.training.models import build_models, find_start_weights

ROOT = Path(__file__).resolve().parents[1]
FIRST_SEED = FIRST_FREE_SEED + 100_000
BATCH_SIZE = 8
PEAK_LR, LOWEST_LR, WARMUP_STEPS = 1.5e-3, 5e-5, 200
EMA_DECAY = 0.998
SAVE_EVERY = 250


def draw_sample(seed: int, *, num_frames: int, size: tuple[int, int], fps: float) -> tuple[Tensor, str]:
    """Draws a clip at twice the size and shrinks it, as the loader does with the demo's files."""
    frames_thwc, _, caption = draw_clip(
        seed, height=2 * size[0], width=2 * size[1], fps=fps, num_frames=num_frames
    )
    frames = torch.from_numpy(frames_thwc).permute(0, 3, 1, 2).float()
    frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    return frames.round().clamp(0, 255).to(torch.uint8), caption


def encode_clips(pipeline: VideoDiffusion, config: RunConfig, *, count: int, path: Path) -> dict[str, Tensor]:
    """Returns posterior moments and text embeddings of `count` drawn clips, from `path` when it has them."""
    if path.exists():
        return load_file(path)
    params, rows = config.data.params, []
    for number in range(count):
        video, caption = draw_sample(
            FIRST_SEED + number, num_frames=params.max_num_frames, size=params.video_size, fps=params.fps
        )
        encoders = pipeline.encoders
        rows.append({**encoders.video(video, subject="a drawn clip"), "text": encoders.text(caption)})
        if number % 400 == 0:
            print(f"encoded {number}/{count} clips", flush=True)
    encoded = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    save_file(encoded, path)
    return encoded


def encoded_batch(encoded: dict[str, Tensor], step: int) -> EncodedBatch:
    """Returns the batch of a step; a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    picked = torch.randint(len(encoded["mean"]), (BATCH_SIZE,), generator=generator)
    moments = {name: encoded[name][picked] for name in ("mean", "logvar")}
    first, num_frames = step * BATCH_SIZE, 4 * encoded["mean"].shape[1] - 3
    return EncodedBatch(
        encodings={"clip": moments, "text": {"text": encoded["text"][picked]}},
        clip_ids=tuple(str(int(i)) for i in picked),
        sample_indices=tuple(range(first, first + BATCH_SIZE)),
        num_shown=(num_frames,) * BATCH_SIZE,
        step_positions=tuple(StepPosition(step, position, BATCH_SIZE) for position in range(BATCH_SIZE)),
    )


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by step, then linear decay by `progress`, the used share of the time."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (PEAK_LR + (LOWEST_LR - PEAK_LR) * min(1.0, progress))


def train(
    pipeline: VideoDiffusion, encoded: dict[str, Tensor], *, minutes: float, state_path: Path
) -> dict[str, Tensor]:
    """Trains until the time is used up, over all calls together, and returns the averaged weights."""
    dit = pipeline.dit
    parameters = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    step, used_s, recent = 0, 0.0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        dit.load_state_dict(state["dit"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, used_s, recent = state["average"], state["step"], state["used_s"], state["recent"]
    while used_s < minutes * 60:
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, used_s / (minutes * 60))
        loss = pipeline.training_loss(encoded_batch(encoded, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        for name, tensor in dit.state_dict().items():
            average[name].lerp_(tensor, 1 - decay)
        step, used_s = step + 1, used_s + time.monotonic() - start
        recent = loss.item() if step == 1 else 0.99 * recent + 0.01 * loss.item()
        if step % SAVE_EVERY == 0:
            print(f"step {step} loss {recent:.4f} minutes {used_s / 60:.1f}", flush=True)
            state = {"dit": dit.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**state, "step": step, "used_s": used_s, "recent": recent}, state_path)
            save_file(average, state_path.with_name("dit.safetensors"))
    print(f"{step} steps, smoothed loss {recent:.4f}")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for latents and the training state")
    parser.add_argument("--minutes", type=float, default=27.0, help="training time, over all calls together")
    parser.add_argument("--clips", type=int, default=1200, help="how many clips are drawn")
    parser.add_argument("--model", type=Path, default=ROOT / "configs/model/cogvideox_tiny.yaml")
    options = parser.parse_args()
    files = [options.model, ROOT / "configs" / "sft.yaml"]
    load = load_run_config(files, purpose="check", check_paths=False).args.load
    output = Path(expand_assets(load))
    options.work.mkdir(parents=True, exist_ok=True)
    config = load_run_config(files, ["args.load=null", "args.mode=pretrain"])
    mesh = start_single_process()
    pipeline = build_models(config, mesh, find_start_weights(config, mesh))
    encoded = encode_clips(pipeline, config, count=options.clips, path=options.work / "clips.safetensors")
    weights = train(pipeline, encoded, minutes=options.minutes, state_path=options.work / "state.pt")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, output)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
