"""Elementwise steps of a block, which move and keep fewer tensors than their formulas would in eager PyTorch.

A modulation is a row for each segment of the tokens, text and video or text and every frame, and is never
spread over the tokens. A compiler fuses the plain formulas by itself, and gets them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Segments(NamedTuple):
    """Runs of tokens that share a modulation, in order: text, each frame that has one of its own, the rest.

    Args:
        text: Text tokens.
        frames: Frames; 0: the video is in the rest.
        area: Tokens of a frame.
    """

    text: int
    frames: int = 0
    area: int = 0

    def lengths(self, tokens: int) -> list[int]:
        """Returns the length of each segment of so many tokens; the last may be empty."""
        return [self.text, *[self.area] * self.frames, tokens - self.text - self.frames * self.area]


class ModulatedLayerNorm(nn.LayerNorm):
    """LayerNorm followed by the shift and scale of each segment: `norm(x) * (1 + scale) + shift`."""

    def forward(
        self,
        x_bld: Tensor,
        shift_bsd: Tensor | None = None,
        scale_bsd: Tensor | None = None,
        segments: Segments = Segments(0),  # noqa: B008  (immutable)
    ) -> Tensor:
        """Normalises the last dim; without a modulation it is a LayerNorm.

        Args:
            x_bld: Tokens, text first.
            shift_bsd: Shift of each segment, `[b, s, d]`.
            scale_bsd: Scales, less one, of the same.
            segments: The segments; there are s.
        """
        if shift_bsd is None or scale_bsd is None:
            return super().forward(x_bld)
        if torch.compiler.is_compiling():
            spread = (spread_over_tokens(each, x_bld.shape[1], segments) for each in (shift_bsd, scale_bsd))
            shift_bld, scale_bld = spread
            return super().forward(x_bld) * (1 + scale_bld) + shift_bld
        weight_bsd, bias_bsd = 1 + scale_bsd, shift_bsd
        if self.weight is not None:
            weight_bsd, bias_bsd = self.weight * weight_bsd, self.bias * weight_bsd + bias_bsd
        lengths = segments.lengths(x_bld.shape[1])
        out: Tensor = _SegmentNorm.apply(x_bld, weight_bsd, bias_bsd, lengths, self.eps)
        return out


def gated_sum(x_bld: Tensor, y_bld: Tensor, gate_bsd: Tensor, segments: Segments) -> Tensor:
    """Returns `x + gate * y`, with one gate `[d]` for each segment."""
    if torch.compiler.is_compiling():
        return x_bld + spread_over_tokens(gate_bsd, x_bld.shape[1], segments) * y_bld
    out: Tensor = _GatedSum.apply(x_bld, y_bld, gate_bsd, segments.lengths(x_bld.shape[1]))
    return out


def spread_over_tokens(rows_bsd: Tensor, tokens: int, segments: Segments) -> Tensor:
    """Returns the row of each token, `[b, s, d]` to `[b, tokens, d]`."""
    if not segments.frames:
        is_text_l1 = torch.arange(tokens, device=rows_bsd.device)[:, None] < segments.text
        return torch.where(is_text_l1, rows_bsd[:, :1], rows_bsd[:, 1:])
    text, frames, rest = rows_bsd.split([1, segments.frames, 1], dim=1)
    rest_length = segments.lengths(tokens)[-1]
    spread = frames[:, :, None].expand(-1, -1, segments.area, -1).flatten(1, 2)
    return torch.cat([text.expand(-1, segments.text, -1), spread, rest.expand(-1, rest_length, -1)], dim=1)


def rotate_pairs(x_blnk: Tensor, rotation_lk2: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels by its token's angle, in fp32.

    Args:
        x_blnk: Queries or keys, `[b, l, n, k]`.
        rotation_lk2: Cosine and sine, fp32 `[l, k / 2, 2]`.

    Returns:
        `[b, l, n, k]` in the dtype of `x_blnk`.
    """
    pairs, rotation_l1k2 = x_blnk.float().unflatten(-1, (-1, 2)), rotation_lk2[:, None]
    if torch.compiler.is_compiling():  # Inductor does not fuse complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rotation_l1k2.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation_l1k2))
    return rotated.flatten(-2).to(x_blnk.dtype)


class _SegmentNorm(torch.autograd.Function):
    """`norm(x) * weight + bias` with weights of each sample and segment; keeps the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, lengths: list[int], eps: float) -> Tensor:
        out, mean, rstd = _normalized(x, weight, bias, lengths, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.lengths, ctx.eps = lengths, eps
        ctx.version = None if out.is_inference() else out._version
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        g_x, g_weight, g_bias = (
            torch.empty_like(each) if is_wanted else None
            for each, is_wanted in zip((x, weight, bias), wanted, strict=True)
        )
        # of one sample and segment they are a LayerNorm's weights; its kernel gives all gradients at once
        for sample, segment, span in _spans(len(x), ctx.lengths):
            tokens = (each[sample, span] for each in (grads[0], x))
            statistics = (each[sample, span] for each in (mean, rstd))
            rows = (each[sample, segment] for each in (weight, bias))
            g_tokens, *g_rows = torch.ops.aten.native_layer_norm_backward(
                *tokens, x.shape[-1:], *statistics, *rows, wanted
            )
            if g_x is not None:
                g_x[sample, span] = g_tokens
            for whole, row in zip((g_weight, g_bias), g_rows, strict=True):
                if whole is not None:
                    whole[sample, segment] = row
        return g_x, g_weight, g_bias, None, None


def _normalized(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `norm(x) * weight + bias`, and mean and reciprocal deviation of each token."""
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    for part, scale, shift in zip(out.split(lengths, 1), weight.split(1, 1), bias.split(1, 1), strict=True):
        torch.addcmul(shift, part, scale, out=part)
    return out, mean, rstd


def norm_behind(tensor: Tensor) -> Any | None:
    """Returns autograd's node of the modulated norm whose output a tensor is, or is a view of; else None."""
    whole = tensor if tensor._base is None else tensor._base
    node: Any = whole.grad_fn
    is_norm = getattr(node, "_forward_cls", None) is _SegmentNorm
    return node if is_norm and whole._version == node.version else None


def compute_norm_again(node: Any) -> Tensor:
    """Returns the output of the norm of `norm_behind`, from what it keeps for its own backward."""
    x, _, _, weight, bias = node.saved_tensors
    with torch.no_grad():
        return _normalized(x, weight, bias, node.lengths, node.eps)[0]


def _spans(samples: int, lengths: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    ends = list(itertools.accumulate(lengths))
    for sample in range(samples):
        for segment, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            yield sample, segment, slice(end - length, end)


class _GatedSum(torch.autograd.Function):
    """`x + gate * y` with gates of each sample and segment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, lengths: list[int]) -> Tensor:
        out = torch.empty_like(x)
        parts = (each.split(lengths, 1) for each in (out, x, y))
        for out_part, x_part, y_part, row in zip(*parts, gate.split(1, 1), strict=True):
            torch.addcmul(x_part, row, y_part, out=out_part)
        ctx.save_for_backward(gate, *([y] if ctx.needs_input_grad[2] else []))
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, lengths = grads[0], ctx.lengths
        gate, *kept = ctx.saved_tensors
        g_y, g_gate = None, None
        if ctx.needs_input_grad[1]:
            g_y = torch.empty_like(grad)
            parts = g_y.split(lengths, 1), grad.split(lengths, 1)
            for g_part, part, row in zip(*parts, gate.split(1, 1), strict=True):
                torch.mul(part, row, out=g_part)
        if ctx.needs_input_grad[2]:
            sums = [part.sum(1, keepdim=True) for part in (grad * kept[0]).split(lengths, 1)]
            g_gate = torch.cat(sums, dim=1)
        return grad, g_y, g_gate, None
