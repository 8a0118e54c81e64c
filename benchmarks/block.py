"""Counts and times one block of the transformer, next to that of diffusers (`pip install -e ".[test]"`).

    python benchmarks/block.py count     # the released models at their own sizes, on the meta device
    python benchmarks/block.py compiled  # compiled ones; what Inductor reports of a small one
    python benchmarks/block.py time      # forward and backward on this machine, the two blocks in turn

A row is a tensor of tokens x width in bfloat16. `kept` are the rows that a forward keeps for its backward,
with the block's input and without weights and the tables of all blocks. `moved` are the rows that elementwise
operations read and write in forward, recomputed forward and backward, without matrix products and attention,
whose time depends on arithmetic instead. On a CPU, times are CPU times. Of a compiled block, `kept` is what
AOTAutograd's partitioner decides, and `moved` what the kernels that Inductor has fused read and write.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.metrics
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_parts.check import kept_bytes
from sat_train.cli.main import run_cli
from sat_train.config import NetworkSpec, RunConfig, load_run_config
from sat_train.config.parts.adapter_parts import AdapterConfig
from sat_train.config.parts.position_parts import PositionConfig
from sat_train.config.parts.record import Recompute
from sat_train.distributed.processes import start_single_process
from sat_train.models.build import add_adapters_of, build_dit
from sat_train.models.dit.recompute import POLICIES, recomputing
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.half_on_cpu import half_products
from sat_train.models.meta_models import build_meta_dit, build_meta_inputs
from sat_train.models.meters import Traffic, bytes_in, flash_attention
from sat_train.models.recompute_budget import count_block_costs, count_compiled_blocks
from sat_train.models.trainable import select_configured

MODELS = ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b")
TEXT = 226  # tokens
SERIAL = {"compile_threads": 1, "force_disable_caches": True}
BANS = (  # see `recompute_elementwise`
    "ban_recompute_materialized_backward",
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
)
ONE_LAYER = "model.network_config.params.num_layers=1"

# a block as a function of inputs, and the inputs
Block = tuple[Callable[..., Any], tuple[Tensor, ...]]


def our_block(
    dit: DiffusionTransformer, latent: Tensor, text: Tensor, *, recompute: Recompute = "off"
) -> Block:
    """Returns our block as a function of its tokens and time features."""
    like = {"dtype": dit.dtype, "device": latent.device}
    emb = torch.randn(len(latent), dit.spec.time_width, **like)
    context = dit.block_context(emb, latent, text)
    tokens = context.text_length + context.grid.tokens
    x = torch.randn(len(latent), tokens, dit.spec.width, **like, requires_grad=True)

    def run(x: Tensor, emb: Tensor) -> Tensor:
        return recomputing(dit.blocks[0], x, context._replace(emb_bd=emb), recompute=recompute)

    return run, (x, emb)


def diffusers_block(ours: Block, spec: NetworkSpec, text_length: int) -> Block:
    """Returns diffusers' block for the inputs of ours."""
    x, emb = ours[1]
    with x.device:
        block = CogVideoXBlock(spec.width, spec.heads, spec.head_width, spec.time_width, attention_bias=True)
        tables = tuple(torch.ones(x.shape[1] - text_length, spec.head_width) for _ in range(2))
    block.to(x.dtype)
    rotary = tables if "Rotary" in spec.positions.target else None
    text, video = (part.detach().requires_grad_() for part in x.tensor_split((text_length,), dim=1))
    return lambda text, video, emb: block(video, text, emb, image_rotary_emb=rotary), (text, video, emb)


def read_models() -> Iterator[tuple[str, RunConfig]]:
    """Yields the released models with one layer, all weights trained and with adapters."""
    for name in MODELS:
        for adapter in ((), ("configs/lora.yaml",)):
            files = [f"configs/model/{name}.yaml", *adapter]
            config = load_run_config(files, [ONE_LAYER], purpose="check", check_paths=False)
            yield f"{name}{' LoRA' if adapter else ''}", config


@flash_attention()
def count() -> None:
    """Prints the rows that a layer keeps and moves."""
    for name, config in read_models():
        spec, data = config.spec, config.require_data().params
        dit = build_dit(spec, device=torch.device("meta"), dtype=torch.bfloat16)
        select_configured(dit, config.model)
        shape = spec.latent(data.max_num_frames, *data.video_size)
        size = (1, shape.padded_frames, spec.in_channels, shape.height, shape.width)
        latent = torch.empty(size, device="meta")
        text = torch.empty(1, spec.text.max_length, spec.text_width, device="meta")
        ours, again = (our_block(dit, latent, text, recompute=each) for each in ("off", "full"))
        row, rotation = bytes_in(ours[1][0]), dit.block_context(ours[1][1], latent, text).rotation_lk2
        tables = () if rotation is None else (rotation,)
        print(f"{name:<22} {_counted(ours, again, tables, row=row)}")
        if spec.adapter is None:
            run, inputs = theirs = diffusers_block(ours, spec, text.shape[1])
            again = (functools.partial(checkpoint, run, use_reentrant=False), inputs)
            print(f"  {'diffusers':<20} {_counted(theirs, again, (), row=row)}")


def compiled(options: argparse.Namespace) -> None:
    """Prints the rows that compiled layers keep, and those that Inductor's kernels of a small one move."""
    torch._logging.set_logs(inductor_metrics=True)  # without it nothing is counted
    for name, config in read_models():
        dit, inputs = build_meta_dit(config, layers=2), build_meta_inputs(config, 1)
        (*_, costs), (*_, off) = (
            count(dit, inputs).values() for count in (count_block_costs, count_compiled_blocks)
        )
        row = costs[-1].kept  # `full` keeps its input
        kept = {policy: cost.kept / row for policy, cost in zip(POLICIES, costs, strict=True)}
        kept["off"] = off / row
        print(f"{name:<22} kept " + "   ".join(f"{policy} {rows:4.1f}" for policy, rows in kept.items()))
    for recipe in ("sft", "lora"):
        _, block = small_block(
            options.width, torch.device("cpu"), torch.bfloat16, size=(32, 32), adapted=recipe == "lora"
        )
        row = bytes_in(block[1][0])
        for label, bans in (("torch's settings", True), ("ours", False)):
            print(f"{recipe}, {label:<18} {_reported(block, bans=bans, row=row)}", flush=True)
        with Traffic() as traffic:
            _forward_backward(block)
        kept = kept_bytes(functools.partial(block[0], *block[1])) / row
        print(f"{recipe}, {'eager':<18} kept {kept:5.1f}   moved {traffic.moved / row:4.0f}")


def _reported(block: Block, *, bans: bool, row: int) -> str:
    """Returns the rows that a block keeps and moves, compiled by Inductor, with or without torch's bans."""
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    run, inputs = block
    with torch._functorch.config.patch(dict.fromkeys(BANS, bans)), torch._inductor.config.patch(SERIAL):
        code = torch.compile(run, dynamic=False)
        kept = kept_bytes(functools.partial(code, *inputs))
        _forward_backward((code, inputs))
    nodes = torch._inductor.metrics.nodes_num_elem
    moved = sum(4 * quarter for node, quarter in nodes if not node.is_extern())
    return f"kept {kept / row:5.1f}   moved {moved / row:4.0f}"


def _counted(block: Block, recomputed: Block, tables: tuple[Tensor, ...], *, row: int) -> str:
    kept = kept_bytes(functools.partial(block[0], *block[1]), shared=tables) / row
    with Traffic() as traffic:
        _forward_backward(recomputed)
    return f"kept {kept:5.1f}   moved {traffic.moved / row:4.0f}"


def small_block(
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: tuple[int, int] = (60, 64),
    adapted: bool = False,
) -> tuple[NetworkSpec, Block]:
    """Returns the numbers of a small transformer, and a block of it with random inputs."""
    spec = NetworkSpec(
        layers=1,
        width=width,
        heads=width // 64,
        in_channels=16,
        out_channels=16,
        patch=(1, 2, 2),
        text_width=4096,
        time_width=512,
        temporal_compression=4,
        spatial_compression=8,
        positions=PositionConfig.of("Rotary3DPositionEmbedding", {"text_length": TEXT}),
        trained_latent=(4, *size),
    )
    dit = DiffusionTransformer(spec, device=device, dtype=dtype)
    if adapted:
        dit.requires_grad_(False)
        add_adapters_of(dit, AdapterConfig.of("Lora", {"r": 16}), seed=0)
    latent = torch.randn(1, 4, 16, *size, device=device, dtype=dtype)
    return spec, our_block(dit, latent, torch.randn(1, TEXT, 4096, device=device, dtype=dtype))


def timed(options: argparse.Namespace) -> None:
    """Prints the time of forward and backward of both blocks, and the median of the ratios."""
    for dtype in (torch.float32, torch.bfloat16):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spec, ours = small_block(options.width, device, dtype)
        theirs = diffusers_block(ours, spec, TEXT)
        pairs = []
        for _ in range(options.repeats + 1):
            with half_products(device, dtype):
                seconds_of_ours = _seconds(ours)
            pairs.append((seconds_of_ours, _seconds(theirs)))
        seconds = [statistics.median(column) for column in zip(*pairs[1:], strict=True)]
        ratio = statistics.median(own / other for own, other in pairs[1:])
        print(
            f"{dtype!s:<15} ours {seconds[0] * 1e3:7.1f} ms   diffusers {seconds[1] * 1e3:7.1f} ms   "
            f"ratio {ratio:.2f} (median of {options.repeats})"
        )


def _seconds(block: Block) -> float:
    is_cuda = block[1][0].is_cuda
    clock = time.perf_counter if is_cuda else time.process_time
    start = clock()
    _forward_backward(block)
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def _forward_backward(block: Block) -> None:
    run, inputs = block
    outputs = run(*inputs)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("count", "compiled", "time"), nargs="?", default="count")
    parser.add_argument("--width", type=int, default=1024, help="width of blocks that are timed or compiled")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs, after one that warms up")
    options = parser.parse_args()
    torch.manual_seed(0)
    start_single_process("auto")
    {"count": lambda _: count(), "compiled": compiled, "time": timed}[options.what](options)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
