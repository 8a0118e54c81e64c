"""Activations of a block: which the forward keeps, and which the backward computes again."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
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
    contexts = functools.partial(create_selective_checkpoint_contexts, _KEPT[recompute])
    return checkpoint(block, x_bld, context, use_reentrant=False, context_fn=contexts)


def recompute_elementwise() -> None:
    """Lets a compiled backward compute elementwise operations again wherever that saves memory.

    By default torch keeps them where a matrix product needs them, where they are used long after, and in long
    chains: 22 rows instead of 13. A block is a bounded chain.
    """
    settings = torch._functorch.config
    settings.ban_recompute_materialized_backward = False
    settings.ban_recompute_used_far_apart = False
    settings.ban_recompute_long_fusible_chains = False
