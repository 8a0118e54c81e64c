"""Frozen weights in 8 or 4 bits: a code for each element, and a scale for each block of up to 64 of them.

    int8: w = s * c,       c of -127 to 127,                             s = max |w| / 127
    nf4:  w = s * q[c],    q 16 quantiles of a normal distribution,      s = max |w|

The maximum is that of the block. Blocks lie along a layer's inputs, so a rank's shard has the codes and
scales that it has in the whole weight, where its inputs divide into blocks. Scales are in the dtype of
computation, and codes are chosen for the scale as it is rounded.

Source: Dettmers et al., arXiv:2305.14314, section 3 and appendix E: 4-bit NormalFloat, blocks of 64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sat_train.config.parts.record import Quantization

BLOCK = 64
_MOST = 127
# the paper's: quantiles at 7 probabilities below a half, zero, and at 8 above, over the largest of them
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of a weight.

    Args:
        weight: `[out, in]`; for nf4, in is even.
        kind: int8 or nf4.

    Returns:
        int8 codes `[out, in]`, or pairs of nf4 codes, uint8 `[out, in / 2]`, and scales `[out, in / block]`.
    """
    blocks = weight.float().unflatten(1, (-1, math.gcd(weight.shape[1], BLOCK)))
    largest = blocks.abs().amax(2)
    scales = (largest / _MOST if kind == "int8" else largest).to(weight.dtype)
    units = (blocks / torch.where(scales == 0, 1, scales).float()[..., None]).flatten(1)
    if kind == "int8":
        return units.round().clamp(-_MOST, _MOST).to(torch.int8), scales
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    codes = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the weight, `[out, in]` in the dtype of the scales, given what `quantize` returned."""
    if codes.dtype == torch.int8:
        units = codes.to(scales.dtype)
    else:
        levels = torch.tensor(NF4_LEVELS, dtype=scales.dtype, device=scales.device)
        pairs = torch.cartesian_prod(levels, levels)
        units = pairs.index_select(0, codes.flatten().int()).view(len(codes), -1)
    blocks: Tensor = units.unflatten(1, (scales.shape[1], -1)) * scales[..., None]
    return blocks.flatten(1)
