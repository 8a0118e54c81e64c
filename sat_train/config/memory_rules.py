"""Rules on what is computed again, and on what is held in few bits or in host memory."""

from __future__ import annotations

from collections.abc import Iterator

from sat_train.config.rule import ParsedConfig, rule
from sat_train.errors import Fault


@rule("args.checkpoint_activations", "args.checkpoint_every", "args.checkpoint_budget")
def budget_chooses_by_itself(config: ParsedConfig) -> Iterator[Fault]:
    args = config.args
    if args.checkpoint_budget is None:
        return
    instead = "args.checkpoint_budget chooses a policy for each block"
    if args.checkpoint_activations in ("gemm", "attention"):
        expected = f"true or false: {instead}"
        yield config.fault("args.checkpoint_activations", args.checkpoint_activations, expected)
    if args.checkpoint_every > 1:
        yield config.fault("args.checkpoint_every", args.checkpoint_every, f"1: {instead}")


@rule(
    *("args.checkpoint_activations", "args.checkpoint_every", "args.checkpoint_budget"),
    *("args.checkpoint_offload", "args.compile"),
)
def something_is_recomputed(config: ParsedConfig) -> Iterator[Fault]:
    args = config.args
    reason = "args.checkpoint_activations is off"
    if args.checkpoint_budget is not None:
        reason = f"args.checkpoint_budget={args.checkpoint_budget:g} recomputes nothing"
    if args.checkpoint_every > 1 and not args.recomputes:
        yield config.fault("args.checkpoint_every", args.checkpoint_every, f"1: {reason}")
    if args.checkpoint_offload and not args.recomputes:
        expected = f"false: {reason}, and no block keeps its input for that"
        yield config.fault("args.checkpoint_offload", True, expected)
    elif args.checkpoint_offload and args.compile == "blocks":
        expected = "false: a compiled block keeps its own inputs; args.compile=auto does without"
        yield config.fault("args.checkpoint_offload", True, expected)


@rule("args.quantize_base", "args.block_swap", "args.zero_stage", "args.load_lora", "model")
def held_base_is_frozen(config: ParsedConfig) -> Iterator[Fault]:
    """A base that is to be held in few bits or in host memory, and trains, or is divided by ZeRO-3."""
    args = config.args
    reasons = [
        (not config.freezes_base, "the base trains; with adapters (configs/lora.yaml) it does not"),
        (args.zero_stage == 3, "args.zero_stage=3 divides weights as they are; 1 and 2 leave them whole"),
        (
            bool(args.load_lora) and config.spec.adapter is None,
            "args.load_lora is merged into the base, which checkpoints then hold; use adapters",
        ),
    ]
    for key, off in (("quantize_base", "off"), ("block_swap", 0)):
        value = getattr(args, key)
        for _, reason in (each for each in reasons if each[0] and value != off):
            yield config.fault(f"args.{key}", value, f"{off}: {reason}")


@rule("args.block_swap", "args.compile", "model")
def swapped_blocks_save_memory(config: ParsedConfig) -> Iterator[Fault]:
    count, layers = config.args.block_swap, config.spec.layers
    if 0 < count < 3 or count > layers:
        some = f", or 3 to {layers}" if layers >= 3 else ""
        expected = f"0{some}: two of this model's {layers} blocks are always on the GPU"
        yield config.fault("args.block_swap", count, expected)
    if count and config.args.compile == "blocks":
        expected = "0: a compiled block cannot wait for its weights; args.compile=auto does without"
        yield config.fault("args.block_swap", count, expected)
