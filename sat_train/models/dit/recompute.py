"""Activations of a block: which the forward keeps, and which the backward computes again."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sat_train.config.parts.record import Recompute
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import BlockContext

# by what they keep, most first; with frozen weights `gemm` keeps more than `off`
POLICIES: tuple[Recompute, ...] = ("off", "gemm", "attention", "full")
_aten = torch.ops.aten
_ATTENTION = [
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
_PRODUCTS = [_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default]
# outputs of these operations are kept; all else but the block's input is computed again
_KEPT: dict[Recompute, list[torch._ops.OpOverload[..., Any]]] = {
    "attention": _ATTENTION,
    "gemm": _ATTENTION + _PRODUCTS,
}


def recomputing(block: DitBlock, x_bld: Tensor, context: BlockContext, *, recompute: Recompute) -> Tensor:
    """Runs a block; in training its backward computes again what the policy does not keep.

    Args:
        block: The block.
        x_bld: Tokens.
        context: Its other inputs.
        recompute: `off` keeps everything, `gemm` the outputs of matrix products and attention, `attention`
            that of attention, `full` the block's input alone.
    """
    if recompute == "off" or not torch.is_grad_enabled():
        return block(x_bld, context)
    if recompute == "full":
        return checkpoint(block, x_bld, context, use_reentrant=False)
    selective = create_selective_checkpoint_contexts if torch.compiler.is_compiling() else _contexts
    contexts = functools.partial(selective, _KEPT[recompute])
    return checkpoint(block, x_bld, context, use_reentrant=False, context_fn=contexts)


def _contexts(kept: list[torch._ops.OpOverload[..., Any]]) -> tuple[Any, Any]:
    """Returns the modes of a block's forward and of its second run."""
    caching, cached = create_selective_checkpoint_contexts(kept)
    return caching, _SecondRun(cached, kept)


class _SecondRun(TorchDispatchMode):
    """Second run of a block, with the outputs of kept operations from the first.

    torch's own mode expects all other operations of the first run too. ZeRO-3 gathers weights between them,
    which takes other operations in the backward.

    Args:
        cached: torch's own mode.
        kept: The kept operations.
    """

    def __init__(self, cached: Any, kept: list[torch._ops.OpOverload[..., Any]]) -> None:
        super().__init__()
        self._cached, self._kept = cached, kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True, as torch's own mode does."""
        return True

    def __enter__(self) -> _SecondRun:
        getattr(self._cached, "func_counter", {}).clear()  # only newer versions of torch count
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._kept:
            return self._cached.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def recompute_elementwise() -> None:
    """Lets a compiled backward compute elementwise operations again wherever that saves memory.

    By default torch keeps them where a matrix product needs them, where they are used long after, and in long
    chains: 22 rows instead of 13. A block is a bounded chain.
    """
    settings = torch._functorch.config
    settings.ban_recompute_materialized_backward = False
    settings.ban_recompute_used_far_apart = False
    settings.ban_recompute_long_fusible_chains = False
