"""Half-precision products on a CPU without instructions for them: in fp32, rounded once, keeping no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_train.models import half_on_cpu
from sat_train.models.dit.recompute import POLICIES
from sat_train.models.half_on_cpu import half_products
from tests.networks import build_network

CPU, HALF = torch.device("cpu"), (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_on_cpu, "has_instructions", lambda dtype: False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("trained", ["x", "weight", "bias", "x weight bias"])
def test_a_linear_layer_is_its_product_in_fp32_rounded_once(dtype, shape, trained):
    leaves = {
        name: torch.randn(*size, dtype=dtype).requires_grad_(name in trained)
        for name, size in (("x", shape), ("weight", (4, 6)), ("bias", (4,)))
    }
    wide = {name: leaf.detach().float().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    with half_products(CPU, dtype):
        out = F.linear(*leaves.values())
    expected = F.linear(*wide.values())
    assert torch.equal(out, expected.to(dtype))
    weight = torch.randn_like(out)
    out.backward(weight)
    expected.backward(weight.float())
    for name, leaf in leaves.items():
        assert leaf.requires_grad == (leaf.grad is not None)
        if leaf.grad is not None:
            assert torch.allclose(leaf.grad, wide[name].grad.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("trained", ["input", "weight", "both"])
def test_it_keeps_what_a_linear_layer_keeps(trained):
    layer = nn.Linear(6, 4, dtype=torch.bfloat16).requires_grad_(trained != "input")
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16, requires_grad=trained != "weight")
    kept: list[list[tuple[int, torch.dtype]]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[-1].append((tensor.numel(), tensor.dtype))
        return tensor

    for context in (half_products(CPU, torch.bfloat16), half_products(CPU, torch.float32)):
        kept.append([])
        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
    assert sorted(kept[0], key=str) == sorted(kept[1], key=str)


def test_a_convolution_is_computed_in_fp32():
    convolution = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5, 6, dtype=torch.bfloat16)
    with half_products(CPU, torch.bfloat16):
        out = convolution(x)
    assert torch.equal(out, convolution.float()(x.float()).bfloat16())


def test_only_half_precision_on_such_a_cpu_is_touched(monkeypatch):
    own = F.linear, F.conv2d
    for device, dtype in ((CPU, torch.float32), (torch.device("cuda"), torch.bfloat16)):
        with half_products(device, dtype):
            assert (F.linear, F.conv2d) == own
    with half_products(CPU, torch.bfloat16), half_products(CPU, torch.bfloat16):
        wide, weight = torch.randn(3, 6), torch.randn(4, 6)
        assert torch.equal(F.linear(wide, weight), own[0](wide, weight))
        on_meta = F.linear(wide.to("meta", torch.bfloat16), weight.to("meta", torch.bfloat16))
        assert (on_meta.device.type, on_meta.dtype) == ("meta", torch.bfloat16)
    assert (F.linear, F.conv2d) == own
    monkeypatch.setattr(half_on_cpu, "has_instructions", lambda dtype: True)
    with half_products(CPU, torch.bfloat16):
        assert (F.linear, F.conv2d) == own


def test_what_a_block_computes_again_is_what_it_computed():
    torch.manual_seed(0)
    dit = build_network(dtype=torch.bfloat16)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    latent = torch.randn(1, 3, 4, 4, 6, dtype=torch.bfloat16)
    text = torch.randn(1, 5, 12, dtype=torch.bfloat16)
    gradients = []
    with half_products(CPU, torch.bfloat16):
        for dit.recompute in POLICIES:
            dit.zero_grad()
            dit(latent, torch.tensor([500]), text).float().square().mean().backward()
            gradients.append([parameter.grad for parameter in dit.parameters()])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_compiled_blocks_have_it_too():
    layer = nn.Linear(6, 4, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    with half_products(CPU, torch.bfloat16):
        plain = layer(x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(plain, compiled)
