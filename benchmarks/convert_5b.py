"""Converts a CogVideoX-5B-shaped checkpoint of random bf16 weights both ways; prints time and most resident
memory.

    python benchmarks/convert_5b.py [--layers 42] [--folder DIR]      # 42 layers: 11 GB, three times on disk
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.interchange.diffusers_folder import STEM
from sat_train.models.build import build_dit
from sat_train.weights.diffusers_keys import transformer_to_diffusers
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, shard_tensor
from sat_train.weights.safetensors_out import write_safetensors

PRESET = "configs/model/cogvideox_5b.yaml"
# starts the command, waits, and reports what the system says of the child
_MEASURE = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "sat_train.cli.main", "convert", *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, file=sys.stderr)
sys.exit(code)
"""


def random_weights(words: list[str]) -> LazyWeights:
    """Random weights of the preset, generated on access."""
    start_single_process()
    spec = load_run_config([PRESET], words, purpose="check", check_paths=False).spec
    shapes = build_dit(spec, device="meta", dtype=torch.bfloat16).state_dict()
    lazy_tensors = {}
    for seed, (key, tensor) in enumerate(shapes.items()):
        read = partial(_draw, tuple(tensor.shape), seed)
        lazy_tensors[key] = LazyTensor(tuple(tensor.shape), torch.bfloat16, read)
    return LazyWeights(lazy_tensors, where="random weights")


def _draw(shape: tuple[int, ...], seed: int, shard: Shard | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    noise = torch.randint(0, 2**15, (count,), generator=generator, dtype=torch.int16)
    # bits below the exponent of 2: every value is finite
    return shard_tensor(noise.bitwise_and(0x3FFF).view(torch.bfloat16).view(shape), shard)


def convert(*words: str) -> tuple[float, float]:
    """Runs the command; returns seconds and GiB."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *words], stderr=subprocess.PIPE, text=True, check=True
    )
    return time.monotonic() - began, float(done.stderr.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="42 is the real model")
    parser.add_argument("--folder", type=Path, help="where about 33 GB fit, for 42 layers")
    options = parser.parse_args()
    layers = f"model.network_config.params.num_layers={options.layers}"
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        weights = transformer_to_diffusers(random_weights([layers]))
        (folder / "source" / "transformer").mkdir(parents=True)
        write_safetensors(
            folder / "source" / "transformer", STEM, weights, metadata={}, progress=lambda n: None
        )
        preset = folder / "preset.yaml"
        network = f"{{network_config: {{params: {{num_layers: {options.layers}}}}}}}"
        preset.write_text(f"base: [{Path(PRESET).resolve()}]\nmodel: {network}\n")
        print(f"{options.layers} layers, {weights.num_bytes / 1e9:.1f} GB in bf16")
        for source, dest, words in (
            ("source", "sat", ["--to", "sat"]),
            ("sat", "diffusers", ["--to", "diffusers", "--base", str(preset)]),
        ):
            seconds, gib = convert(str(folder / source), str(folder / dest), *words)
            print(f"{source:>8} -> {dest:9}  {seconds:7.1f} s  {gib:5.1f} GiB resident at most")


if __name__ == "__main__":
    main()
