"""Compares the memory of a step on preference pairs with that of a LoRA step on as many videos.

    python benchmarks/preference_memory.py                                              # embedded model, CPU
    python benchmarks/preference_memory.py --base configs/model/cogvideox_5b.yaml --device meta

Every tensor that the two steps make is counted while it lives: forward, backward, and the pass without
adapters before them. Weights are left out: they are the same ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sat_train.config import ModelSpec, RunConfig, load_run_config
from sat_train.data.batches import StepPosition
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.build import build_encoders
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.models.build import build_dit, compute_dtype
from sat_train.models.meters import LivingTensors, flash_attention
from sat_train.models.trainable import select_configured
from sat_train.objective.build import build_pipeline

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MOST = 1.05
PAIRS = (
    "data.fields.losers.kind=pair",
    "model.conditions.pairs.target=PreferencePairs",
    "model.loss_terms.diffusion.weight=0",
    "model.loss_terms.better.target=Preference",
)


def peak_of_step(config: RunConfig, *, samples: int, losers: int, device: str) -> int:
    """Returns the most bytes that lived at once in a step, without weights.

    Args:
        config: Model and recipe.
        samples: Clips of the batch.
        losers: Videos that lost against each; 0 for a batch without pairs.
        device: `cpu`, or `meta`, where nothing is allocated.
    """
    dtype = compute_dtype(config.args)
    dit = build_dit(
        config.spec, device=device, dtype=dtype, recompute=config.args.checkpoint_activations
    ).train()
    select_configured(dit, config.model)
    pipeline = build_pipeline(config, dit=dit, encoders=build_encoders(config, torch.device(device)))
    batch = random_batch(config, samples=samples, losers=losers, device=device)
    living = LivingTensors(dit)
    with flash_attention() if device == "meta" else torch.enable_grad(), living:
        pipeline.training_loss(batch).loss.backward()
    return living.peak


def random_batch(config: RunConfig, *, samples: int, losers: int, device: str) -> EncodedBatch:
    """Returns encodings of clips of the configuration's size, with losers where there are some."""
    spec: ModelSpec = config.spec
    data = config.require_data().params
    latent = spec.latent(data.max_num_frames, *data.video_size)
    shape = (latent.frames, spec.out_channels, latent.height, latent.width)

    def moments(*lead: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(*lead, *shape, device=device) for name in ("mean", "logvar")}

    text = torch.zeros(samples, spec.text_length, spec.text_width, device=device)
    return EncodedBatch(
        encodings={
            "clip": moments(samples),
            "text": {"text": text},
            **({"pairs": moments(samples, losers)} if losers else {}),
        },
        clip_ids=tuple(f"{index}.mp4" for index in range(samples)),
        sample_indices=tuple(range(samples)),
        num_shown=(data.max_num_frames,) * samples,
        step_positions=tuple(StepPosition(0, index, samples) for index in range(samples)),
    )


def compare(base: str | Path, *, losers: int = 1, device: str = "cpu") -> tuple[int, int]:
    """Returns the peaks of a step on one clip with its losers, and of a LoRA step on as many clips."""
    start_single_process()
    files = [str(base), str(CONFIGS / "lora.yaml")]
    data = "args.train_data=[unread]"
    plain, pairs = (load_run_config(files, [data, *words], check_paths=False) for words in ((), PAIRS))
    return (
        peak_of_step(pairs, samples=1, losers=losers, device=device),
        peak_of_step(plain, samples=1 + losers, losers=0, device=device),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both peaks and their ratio; fails above the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default=str(CONFIGS / "model/cogvideox_tiny.yaml"))
    parser.add_argument("--losers", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "meta"], default="cpu")
    options = parser.parse_args(argv)
    pairs, plain = compare(options.base, losers=options.losers, device=options.device)
    ratio = pairs / plain
    clips = 1 + options.losers
    print(f"pairs {pairs / 1e6:.1f} MB, LoRA on {clips} clips {plain / 1e6:.1f} MB: {ratio:.3f} x")
    return int(ratio > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
