"""The memory ladder: what a rung takes of the GPU, its time, and that it computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.gpu_parts.check import Check, Finding, Setting, at_most, relative_error, within
from benchmarks.gpu_parts.random_run import Measured, measure_steps, planned_peak, read_run

_LAYERS = 8
_STEPS = 4
_HALF = 0.01  # losses in half precision, whose gradients are added up in another order
_ROUNDED = {"int8": 0.01, "nf4": 0.1}  # of losses, by weights that are held in so many bits


def frozen_base(setting: Setting) -> Iterator[Finding]:
    """Yields the rungs of a frozen base, which adapters train over."""
    rungs = {
        "plain": (),
        "inputs on the host": ("args.checkpoint_offload=true",),
        "int8": ("args.quantize_base=int8",),
        "nf4": ("args.quantize_base=nf4",),
    }
    if not setting.tiny:  # two blocks are always on the GPU, as many as the small model has
        rungs |= {
            "half of the blocks swapped": (f"args.block_swap={_LAYERS // 2}",),
            "all blocks swapped": (f"args.block_swap={_LAYERS}",),
            "nf4, all blocks swapped": ("args.quantize_base=nf4", f"args.block_swap={_LAYERS}"),
        }
    yield from _compared(setting, "lora", rungs)


def all_weights(setting: Setting) -> Iterator[Finding]:
    """Yields the rungs of the optimizer where all weights train."""
    zero = "deepspeed.zero_optimization"
    rungs = {
        "plain": (),
        "optimizer on the host": ("args.zero_stage=2", f"{zero}.offload_optimizer.device=cpu"),
    }
    if setting.on_gpu and find_spec("bitsandbytes"):
        rungs["AdamW8bit"] = ("deepspeed.optimizer.type=AdamW8bit",)
    yield from _compared(setting, "sft", rungs)


def _compared(setting: Setting, recipe: str, rungs: dict[str, tuple[str, ...]]) -> Iterator[Finding]:
    expected: Measured | None = None
    for name, rung in rungs.items():
        words = (f"model.network_config.params.num_layers={_LAYERS}", "args.bf16=true", "args.compile=off")
        config = read_run(setting, "cogvideox_5b", recipe, *words, "args.checkpoint_activations=full", *rung)
        found = measure_steps(setting, config, 2 if setting.tiny else _STEPS)
        expected = expected or found
        bits = next((bits for bits in _ROUNDED if bits in name), None)
        losses, wanted = found.steps.losses, expected.steps.losses
        first = relative_error(losses[:1], wanted[:1])
        yield at_most(f"{name}: error of the first loss", first, _ROUNDED[bits] if bits else 0.0)
        yield at_most(
            f"{name}: error of losses", relative_error(losses, wanted), _ROUNDED[bits] if bits else _HALF
        )
        yield Finding(f"{name}: a step, s", found.steps.median_s, expected.steps.median_s)
        if setting.on_gpu:
            planned = planned_peak(setting, config)
            yield within(f"{name}: peak, GB", found.peak / 1e9, planned / 1e9, least=0.85, most=1.1)


CHECKS = (
    Check("ladder_lora", 1, "offloaded inputs, block swap, int8 and nf4: same losses; peaks", frozen_base),
    Check("ladder_sft", 1, "optimizer on the host and in 8 bits: same losses; peaks", all_weights),
)
