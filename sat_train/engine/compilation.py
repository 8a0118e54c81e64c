"""Compilation of the transformer's blocks, where it is asked for and possible."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sat_train.config import ArgsConfig
from sat_train.distributed.processors import processors_of_a_rank
from sat_train.log import get_logger

log = get_logger(__name__)

_FIRST_OF_TRITON = (7, 0)


def compile_where_asked(dit: nn.Module, args: ArgsConfig, device: torch.device) -> None:
    """Compiles the blocks as `args.compile` says. Call it before DeepSpeed hooks the modules.

    Args:
        dit: The transformer.
        args: The settings.
        device: Where it trains.
    """
    reason = _reason(args, device)
    if device.type == "cuda" and args.compile == "auto":
        log.info("blocks: %s", f"not compiled, {reason}" if reason else "compiled (args.compile=off: not)")
    if reason:
        return
    if device.type == "cuda":
        _share_processors()
    cast(Any, dit).compile_blocks()


def _share_processors() -> None:
    """Lets the ranks of a machine compile with their share of its processors, and not each with all."""
    from torch._inductor import config

    share = processors_of_a_rank()
    config.compile_threads = min(config.compile_threads or share, share)


def compiles_blocks(args: ArgsConfig, device: torch.device) -> bool:
    """Returns whether the blocks of a run are compiled on a device."""
    return not _reason(args, device)


def compiles_on_gpus(args: ArgsConfig) -> bool:
    """Returns whether the blocks of a run are compiled on GPUs that Triton supports."""
    return args.compile == "blocks" or (
        args.compile == "auto" and args.zero_stage < 3 and not _reason_of_host_memory(args)
    )


def _reason(args: ArgsConfig, device: torch.device) -> str:
    """Returns why blocks are not compiled; nothing where they are."""
    if args.compile != "auto":
        return "" if args.compile == "blocks" else "args.compile is off"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return reason_for_eager(args.zero_stage, capability) or _reason_of_host_memory(args)


def _reason_of_host_memory(args: ArgsConfig) -> str:
    moves = args.block_swap or args.checkpoint_offload
    return "args.block_swap and args.checkpoint_offload wait for copies inside a block" if moves else ""


def reason_for_eager(zero_stage: int, capability: tuple[int, int] | None) -> str:
    """Returns why `auto` does not compile; nothing where it does.

    Inductor writes kernels for Triton, which builds a launcher in C for each of them when they first run.

    Args:
        zero_stage: ZeRO stage.
        capability: Of the CUDA device; None on a CPU.
    """
    if capability is None:
        return "auto compiles on GPUs alone"
    if zero_stage == 3:
        return "the hooks of ZeRO-3 break every compiled block"
    if capability < _FIRST_OF_TRITON:
        return f"Triton needs compute capability {'.'.join(map(str, _FIRST_OF_TRITON))}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return reason_without_c()


def reason_without_c() -> str:
    """Returns what Triton lacks to build a launcher; nothing where it has all."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if not any(shutil.which(name) for name in compilers if name):
        return "there is no C compiler (CC, gcc, clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"{header} is missing, which Triton's launchers include"
