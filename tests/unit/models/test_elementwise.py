"""The elementwise steps of a block: the plain formulas, their gradients, and what they keep."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from sat_train.models.dit.elementwise import (
    ModulatedLayerNorm,
    Segments,
    gated_sum,
    rotate_pairs,
    spread_over_tokens,
)
from tests.networks import build_network

# text and the rest; text, frames of their own, and the rest
SEGMENTS = [Segments(0), Segments(2), Segments(5), Segments(1, 2, 2), Segments(2, 1, 2), Segments(0, 3, 1)]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_a_modulated_norm_is_its_formula(segments, affine):
    norm = ModulatedLayerNorm(6, elementwise_affine=affine, dtype=torch.float64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, shift, scale = rows(3, 5, 6), *(rows(3, len(segments.lengths(5)), 6) for _ in range(2))

    def plain(x: Tensor, shift: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
        shift_bld, scale_bld = (spread_over_tokens(each, 5, segments) for each in (shift, scale))
        return norm(x) * (1 + scale_bld) + shift_bld

    def ours(x: Tensor, shift: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
        return norm(x, shift, scale, segments)

    inputs = (x, shift, scale, *norm.parameters())
    check_alike(ours, plain, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_a_gated_sum_is_its_formula(segments):
    inputs = rows(3, 5, 6), rows(3, 5, 6), rows(3, len(segments.lengths(5)), 6)

    def plain(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + spread_over_tokens(gate, 5, segments) * y

    def ours(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return gated_sum(x, y, gate, segments)

    check_alike(ours, plain, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


def check_alike(ours, plain, inputs):
    """Compares values and gradients, with each subset of the inputs in need of a gradient."""
    assert torch.allclose(ours(*inputs), plain(*inputs), rtol=1e-12)
    weight = torch.randn_like(plain(*inputs))
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        chosen = [each for each, is_wanted in zip(inputs[:3], wanted, strict=True) if is_wanted]
        detached = [
            each if is_wanted else each.detach() for each, is_wanted in zip(inputs[:3], wanted, strict=True)
        ]
        gradients = (
            torch.autograd.grad((function(*detached, *inputs[3:]) * weight).sum(), chosen)
            for function in (ours, plain)
        )
        for own, other in zip(*gradients, strict=True):
            assert torch.allclose(own, other, rtol=1e-10, atol=1e-12)


def test_a_compiler_gets_formulas_with_the_same_values():
    norm = ModulatedLayerNorm(6)
    x, shift, scale, y = (torch.randn(2, n, 6) for n in (5, 2, 2, 5))
    heads, angles = torch.randn(2, 5, 3, 4), torch.randn(5, 2)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    steps = (
        (lambda: norm(x, shift, scale, Segments(2))),
        (lambda: gated_sum(x, y, shift, Segments(2))),
        (lambda: rotate_pairs(heads, rotation)),
    )
    for step in steps:
        assert torch.allclose(torch.compile(step, backend="eager", fullgraph=True)(), step(), atol=1e-6)


def test_a_layer_keeps_twenty_rows_for_its_backward():
    """Products' inputs, attention's, and the tokens before each norm: nothing of a modulation or rotation."""
    dit = build_network(width=256, heads=4, latent_size=(8, 16, 16))
    context = dit.block_context(torch.randn(1, 16), torch.randn(1, 8, 4, 16, 16), torch.randn(1, 5, 12))
    x = torch.randn(1, 5 + context.grid.tokens, 256, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dit.blocks[0](x, context)
    kept.pop(context.rotation_lk2.untyped_storage()._cdata)  # one for all layers
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) < 20.5 * x.nbytes
