"""The kernel that computes attention: PyTorch's own, in an order of preference for the whole process.

The order holds for forward, backward and what is recomputed, which must all use the same kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    list_flash_attention_impls,
    sdpa_kernel,
)

from sat_train.config import ArgsConfig
from sat_train.config.schema.args import Attention
from sat_train.errors import ConfigError, Fault
from sat_train.log import get_logger

log = get_logger(__name__)

_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_HOPPER = (9, 0)


def attention_kernels(args: ArgsConfig, device: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which attention prefers the kernel that `args.attention` names.

    Args:
        args: The settings.
        device: Where attention is computed.

    Raises:
        ConfigError: The kernel does not exist on this device.
    """
    on_cuda = device.type == "cuda"
    if args.attention in ("cudnn", "fa3") and not on_cuda:
        raise ConfigError([Fault("args.attention", args.attention, "auto, flash or math on a CPU")])
    if args.attention == "fa3":
        _activate_fa3()
    capability = torch.cuda.get_device_capability(device) if on_cuda else None
    kernels = preferred_kernels(args.attention, capability, deterministic=args.deterministic)
    log.info("attention: %s first", kernels[0].name.lower().removesuffix("_attention"))
    context: AbstractContextManager[None] = sdpa_kernel(kernels, set_priority=True)
    return context


def preferred_kernels(
    choice: Attention, capability: tuple[int, int] | None, *, deterministic: bool
) -> list[SDPBackend]:
    """Returns kernels, the preferred one first; PyTorch takes the first that can serve shape and dtype.

    Args:
        choice: `auto` prefers cuDNN on Hopper, where it is the fastest at a head width of 64, and else flash.
        capability: Of the CUDA device; None on a CPU.
        deterministic: cuDNN's backward pass may differ from run to run, so `auto` leaves it out.
    """
    if choice == "math":
        return [SDPBackend.MATH]
    prefers_cudnn = choice == "cudnn" or (choice == "auto" and capability == _HOPPER and not deterministic)
    first = [SDPBackend.CUDNN_ATTENTION] if prefers_cudnn else []
    return [*first, *_FUSED, SDPBackend.MATH]


def _activate_fa3() -> None:
    """Puts FlashAttention 3 behind PyTorch's flash kernel.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        known = ", ".join(list_flash_attention_impls())
        expected = (
            f"auto, flash or cudnn: FlashAttention 3 cannot be used here ({error}; PyTorch knows {known})"
        )
        raise ConfigError([Fault("args.attention", "fa3", expected)]) from error
