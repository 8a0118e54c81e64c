"""Prints what one forward and backward of the transformer costs: time a layer, peak memory, FLOP/s.

    python benchmarks/transformer.py                                    # the tiny model
    python benchmarks/transformer.py --base configs/model/cogvideox_5b.yaml --layers 4 --compile

Weights are random; a few layers are enough, since all cost the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.trainable import select_trainable

TINY = str(Path(__file__).resolve().parents[1] / "configs/model/cogvideox_tiny.yaml")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", default=[TINY], help="a model file, and configs/lora.yaml")
    parser.add_argument("--layers", type=int, help="layers to build; the model's own when left out")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the fastest is printed")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--checkpoint", action="store_true", help="checkpoint activations")
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device) -> tuple[DiffusionTransformer, tuple]:
    """Builds the transformer and its inputs at the model's own size."""
    words = []
    if options.layers:
        words.append(f"model.network_config.params.num_layers={options.layers}")
    config = load_run_config(options.base, words, purpose="check", check_paths=False)
    params, dtype = config.model.network_config.params, torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
    dit = build_dit(config.model, device=device, dtype=dtype, activation_checkpointing=options.checkpoint)
    select_trainable(dit, not_trainable_prefixes=config.model.not_trainable_prefixes)
    if options.compile:
        dit.compile_blocks()
    height, width = (size // 8 for size in config.data.params.video_size)
    frames = (config.data.params.max_num_frames - 1) // 4 + 1
    frames += -frames % params.patch_size[0]
    patch_embed, position = params.modules.patch_embed_config.params, params.modules.pos_embed_config.params
    where = {"device": device, "dtype": dtype}
    latent = torch.randn(options.batch_size, frames, params.in_channels, height, width, **where)
    timesteps = torch.full((options.batch_size,), 500, device=device)
    text = torch.randn(options.batch_size, position.text_length, patch_embed.text_hidden_size, **where)
    ofs = timesteps if params.ofs_embed_dim else None
    return dit, (latent, timesteps, text, None, ofs)


def step_flops(dit: DiffusionTransformer, inputs: tuple) -> int:
    """Returns model FLOPs of forward and backward in all blocks; frozen weights need no gradient."""
    tokens = dit.patch_grid(inputs[0]).tokens + inputs[2].shape[1]
    linear = 2 * tokens * 12 * dit.hidden_size**2
    attention = 4 * tokens**2 * dit.hidden_size
    passes = 3 if dit.transformer.layers[0].attention.dense.weight.requires_grad else 2
    return (passes * linear + 3 * attention) * len(dit.transformer.layers) * inputs[0].shape[0]


def main() -> None:
    options = parse()
    device = start_single_process("auto").device
    dit, inputs = build(options, device)

    def step() -> float:
        dit.zero_grad()
        start = time.perf_counter()
        dit(*inputs).float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()
    best = min(step() for _ in range(options.steps))
    layers = len(dit.transformer.layers)
    print(f"{layers} layers, {dit.patch_grid(inputs[0])} patches, batch {options.batch_size}, {device.type}")
    print(f"first step {first:.2f} s; then {best * 1e3:.1f} ms, {best * 1e3 / layers:.2f} ms a layer")
    print(f"{step_flops(dit, inputs) / best / 1e9:,.1f} GFLOP/s of model FLOPs")
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
