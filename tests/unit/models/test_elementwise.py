"""The elementwise steps of a block: the plain formulas, their gradients, and what they keep."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_parts.check import kept_bytes
from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.elementwise import (
    ModulatedLayerNorm,
    Segments,
    gated_sum,
    norm_behind,
    rotate_pairs,
    spread_over_tokens,
)
from sat_train.models.dit.recompute import recomputing
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.networks import add_adapters, build_network, norms_as_on_a_gpu

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


@pytest.fixture
def like_a_gpu() -> Iterator[None]:
    with norms_as_on_a_gpu():
        yield


def test_a_layer_keeps_eighteen_rows_for_its_backward(like_a_gpu):
    """Products' inputs but those behind a norm, attention's, and the tokens before each norm."""
    dit = build_network(width=256, heads=4, latent_size=(8, 16, 16))
    context = dit.block_context(torch.randn(1, 16), torch.randn(1, 8, 4, 16, 16), torch.randn(1, 5, 12))
    x = torch.randn(1, 5 + context.grid.tokens, 256, requires_grad=True)
    shared = [context.rotation_lk2]
    kept = kept_bytes(lambda: recomputing(dit.blocks[0], x, context, recompute="off"), shared=shared)
    assert kept < 18.5 * x.nbytes
    plain = kept_bytes(lambda: dit.blocks[0](x, context), shared=shared)
    assert plain - kept == 2 * x.nbytes


def block_in_training(*, adapted: bool) -> tuple[DiffusionTransformer, BlockContext, Tensor]:
    dit = build_network()
    if adapted:
        dit.requires_grad_(False)
        add_adapters(dit, rank=2)
    torch.manual_seed(0)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.3)
    context = dit.block_context(torch.randn(2, 16), torch.randn(2, 3, 4, 4, 6), torch.randn(2, 5, 12))
    return dit, context, torch.randn(2, 5 + context.grid.tokens, 64, requires_grad=True)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("levels", [(), (4,)], ids=["one level", "a level of each frame"])
def test_norms_that_are_computed_again_change_no_bit_of_a_gradient(adapted, levels, like_a_gpu):
    dit, context, x = block_in_training(adapted=adapted)
    context = context._replace(emb_bd=torch.randn(2, *levels, 16))
    trained = [each for each in dit.blocks[0].layer.parameters() if each.requires_grad]
    plain, again = (
        torch.autograd.grad(run().square().sum(), [x, *trained])
        for run in (
            lambda: dit.blocks[0](x, context),
            lambda: recomputing(dit.blocks[0], x, context, recompute="off"),
        )
    )
    assert all(map(torch.equal, plain, again))


def test_a_norm_whose_output_was_changed_in_place_is_kept():
    norm, linear = ModulatedLayerNorm(6), nn.Linear(6, 3)
    x, shift, scale = torch.randn(2, 5, 6), torch.randn(2, 2, 6), torch.randn(2, 2, 6, requires_grad=True)
    modulated = norm(x, shift, scale, Segments(2))
    assert norm_behind(modulated) is norm_behind(modulated.flatten(0, 1)) is not None
    with torch.no_grad():
        modulated.mul_(2)
    assert norm_behind(modulated) is norm_behind(linear(modulated)) is None


def test_a_change_in_place_of_what_a_block_keeps_is_an_error(like_a_gpu):
    """Autograd sees such a change only where nothing is computed again."""
    dit, context, x = block_in_training(adapted=False)
    y = recomputing(dit.blocks[0], x, context, recompute="off")
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \[2, 23, 64\] .* was changed in place"):
        y.sum().backward()
