"""Activations of a block: which the forward keeps, and which the backward computes again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sat_train.config.parts.record import Recompute
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.elementwise import compute_norm_again, norm_behind

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
# devices whose memory is worth more than the time of a norm; the meta device stands for a GPU
_COMPUTES_NORMS_AGAIN = ("cuda", "meta")
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
        recompute: `off` keeps everything, on a GPU without the outputs of modulated norms; `gemm` keeps the
            outputs of matrix products and attention, `attention` that of attention, `full` the block's input.
    """
    if not torch.is_grad_enabled():
        return block(x_bld, context)
    if recompute == "off":
        computes_norms = x_bld.device.type in _COMPUTES_NORMS_AGAIN and not torch.compiler.is_compiling()
        with _norms_computed_again() if computes_norms else contextlib.nullcontext():
            return block(x_bld, context)
    if recompute == "full":
        return checkpoint(block, x_bld, context, use_reentrant=False)
    selective = create_selective_checkpoint_contexts if torch.compiler.is_compiling() else _contexts
    contexts = functools.partial(selective, _KEPT[recompute])
    return checkpoint(block, x_bld, context, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _norms_computed_again() -> Iterator[None]:
    """Lets matrix products behind modulated norms keep no input: their backward computes the norm again.

    All else that is kept goes to the hooks that are in force outside. Compiled blocks need no such help.
    """
    keep, give_back = torch._C._autograd._top_saved_tensors_default_hooks(True) or (_keep, _give_back)

    def pack(tensor: Tensor) -> Any:
        norm = norm_behind(tensor)
        if norm is None:
            return keep(tensor)
        return _NormOutput(norm, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Any) -> Tensor:
        return kept.compute() if isinstance(kept, _NormOutput) else give_back(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _NormOutput(NamedTuple):
    """A tensor in the output of a norm, which is not kept.

    Args:
        norm: Autograd's node of the norm.
        size: Size of the tensor.
        stride: Its strides.
        offset: Where it begins.
    """

    norm: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def compute(self) -> Tensor:
        """Returns the tensor."""
        return compute_norm_again(self.norm).as_strided(self.size, self.stride, self.offset)


def _keep(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _give_back(kept: tuple[Tensor, int]) -> Tensor:
    """Returns a tensor that is as it was; autograd checks that only where there are no hooks."""
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} that a block keeps for its backward was changed in place"
        )
    return tensor


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
