"""Matrix products of half-precision tensors on a CPU that has no instructions for them.

PyTorch's own kernels for such a CPU, one without AVX-512, take 7 times as long as those in fp32 in a forward,
and 60 times in a backward. Computed in fp32 a product has the same terms, and is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def half_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Returns a context in which linear layers and 2D convolutions in half precision are computed in fp32,
    where that is faster.

    It has to hold for forward, backward and what is recomputed alike.

    Args:
        device: Where they are computed.
        dtype: Dtype of inputs and weights.
    """
    needs_help = device.type == "cpu" and dtype in _HALF and not has_instructions(dtype)
    return _in_fp32() if needs_help else nullcontext()


def has_instructions(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN computes products of a half-precision dtype, as it does with AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Replaces PyTorch's functions, which the layers of all libraries call."""
    own_linear, own_conv2d = F.linear, F.conv2d

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _is_half(input):
            return own_linear(input, weight, bias)
        out: Tensor = _Linear.apply(input, weight, bias)
        return out

    def conv2d(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not _is_half(input):
            return own_conv2d(input, weight, bias, *args, **kwargs)
        wide_bias = None if bias is None else bias.float()
        return own_conv2d(input.float(), weight.float(), wide_bias, *args, **kwargs).to(input.dtype)

    F.linear, F.conv2d = linear, conv2d
    try:
        yield
    finally:
        F.linear, F.conv2d = own_linear, own_conv2d


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in _HALF and tensor.device.type == "cpu"


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias`, which keeps for its backward what a linear layer keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        rows = grad.float().reshape(-1, grad.shape[-1])
        g_x = None if weight is None else grad.float() @ weight.float()
        g_weight = None if x is None else rows.T @ x.float().reshape(-1, x.shape[-1])
        g_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return tuple(each if each is None else each.to(grad.dtype) for each in (g_x, g_weight, g_bias))
