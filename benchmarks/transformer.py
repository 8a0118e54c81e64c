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

from sat_train.config import ModelSpec, load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.trainable import select_configured

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
    parser.add_argument("--recompute", default="off", help="off, gemm, attention or full")
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device) -> tuple[ModelSpec, DiffusionTransformer, tuple]:
    """Builds the transformer and its inputs at the model's own size."""
    words = []
    if options.layers:
        words.append(f"model.network_config.params.num_layers={options.layers}")
    config = load_run_config(options.base, words, purpose="check", check_paths=False)
    spec, data = config.spec, config.require_data().params
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dit = build_dit(spec, device=device, dtype=dtype, recompute=options.recompute)
    select_configured(dit, config.model)
    if options.compile:
        dit.compile_blocks()
    shape = spec.latent(data.max_num_frames, *data.video_size)
    where = {"device": device, "dtype": dtype}
    latent = torch.randn(
        options.batch_size, shape.padded_frames, spec.in_channels, shape.height, shape.width, **where
    )
    timesteps = torch.full((options.batch_size,), 500, device=device)
    text = torch.randn(options.batch_size, spec.text.max_length, spec.text_width, **where)
    ofs = timesteps if spec.ofs_width else None
    return spec, dit, (latent, timesteps, text, None, ofs)


def step_flops(spec: ModelSpec, dit: DiffusionTransformer, inputs: tuple) -> int:
    """Returns model FLOPs of forward and backward; frozen weights need no gradient."""
    linear, attention = spec.flops(dit.patch_grid(inputs[0]).tokens + spec.text.max_length)
    passes = 3 if dit.transformer.layers[0].attention.dense.weight.requires_grad else 2
    return (passes * linear + 3 * attention) * inputs[0].shape[0]


def main() -> None:
    options = parse()
    device = start_single_process("auto").device
    spec, dit, inputs = build(options, device)

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
    print(f"{step_flops(spec, dit, inputs) / best / 1e9:,.1f} GFLOP/s of model FLOPs")
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
