"""Frozen weights in few bits or in host memory: what is kept of them, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sat_train.models.adapter import adapted_layers, adapter_state_dict, merge_adapters
from sat_train.models.block_swap import SLOTS
from sat_train.models.dit.sharding import shard_weight
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.frozen_layers import FrozenLayer, hold_frozen_weights
from sat_train.models.quantization import dequantize, quantize
from tests.networks import add_adapters
from tests.unit.models.narrow import inputs, randomized

LAYERS = 5
CPU = torch.device("cpu")


def build(kind: str = "Lora", **options: Any) -> DiffusionTransformer:
    """Builds a transformer with adapters that do something, over a frozen base."""
    dit = randomized(layers=LAYERS, **options)
    targets = (r"attention\.", r"mlp\.", r"adaLN_modulations\.")
    add_adapters(dit, kind, rank=3, alpha=2.0, targets=targets)
    own = adapter_state_dict(dit)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(name in own)
        if name in own:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dit


def passes(dit: DiffusionTransformer) -> list[Tensor]:
    """Returns the output without gradients, then that of a training pass, and the gradients."""
    with torch.no_grad():
        first = dit(*inputs())
    output = dit(*inputs())
    output.square().sum().backward()
    return [first, output, *(each.grad for each in dit.parameters() if each.requires_grad)]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def frozen(dit: DiffusionTransformer) -> dict[str, FrozenLayer]:
    return {name: layer for name, layer in dit.named_modules() if isinstance(layer, FrozenLayer)}


@pytest.mark.parametrize("width", [128, 24])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_every_element_has_the_nearest_level_of_its_block(kind: str, width: int) -> None:
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    codes, scales = quantize(weight, kind)
    levels = dequantize(torch.arange(-127, 128, dtype=torch.int8)[None], torch.ones(1, 1))
    if kind == "nf4":
        bytes_ = torch.arange(256, dtype=torch.uint8)[None]
        levels = dequantize(bytes_, torch.ones(1, 1)).unique()[None]
    possible = scales.repeat_interleave(width // scales.shape[1], dim=1)[..., None] * levels
    nearest = (weight[..., None] - possible).abs().amin(2)
    torch.testing.assert_close((dequantize(codes, scales) - weight).abs(), nearest, rtol=0, atol=1e-6)
    assert codes.nbytes == weight.numel() // (1 if kind == "int8" else 2)


def test_codes_and_scales_of_nf4_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize(weight, "nf4")
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert torch.equal(scales.flatten(), state.absmax)
    torch.testing.assert_close(dequantize(codes, scales), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("layer", ["attention.query_key_value", "attention.dense"])
def test_a_shard_has_the_codes_of_the_whole_weight(layer: str, kind: str) -> None:
    key = f"transformer.layers.0.{layer}.weight"
    weight = torch.randn(384, 128, generator=torch.Generator().manual_seed(3))
    whole = dequantize(*quantize(weight, kind))
    for rank in range(2):
        shard, expected = (shard_weight(key, each, rank=rank, size=2) for each in (weight, whole))
        assert torch.equal(dequantize(*quantize(shard, kind)), expected)


@pytest.mark.parametrize(
    ("kind", "count", "recompute"),
    [("Lora", 3, "off"), ("Lora", LAYERS, "gemm"), ("Dora", LAYERS, "full"), ("Lora", 4, "attention")],
)
def test_swapped_blocks_compute_the_same_numbers(kind: str, count: int, recompute: Any) -> None:
    dit = build(kind, recompute=recompute)
    whole = sum(layer.weight.nbytes for _, layer in adapted_layers(dit))
    swap = hold_frozen_weights(dit, device=CPU, swapped=count)
    assert_equal(passes(dit), passes(build(kind)))
    assert swap.host_bytes == pytest.approx(whole * count / LAYERS, rel=0.02)
    assert swap.device_bytes == swap.host_bytes * SLOTS / count
    assert not any(buffer.nbytes for layer in frozen(dit).values() for buffer in layer.held.buffers())


def dequantized(kind: Any) -> DiffusionTransformer:
    """Builds a transformer whose weights are parameters, with the values that few bits leave of them."""
    dit = build()
    for _, layer in adapted_layers(dit):
        layer.weight.data.copy_(dequantize(*quantize(layer.weight.data, kind)))
    return dit


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_in_few_bits_computes_what_its_dequantized_weights_do(kind: Any) -> None:
    expected = passes(dequantized(kind))
    for words in ({"recompute": "full"}, {"swapped": 3}):
        dit = build(recompute=words.pop("recompute", "off"))
        hold_frozen_weights(dit, device=CPU, quantization=kind, **words)
        assert_equal(passes(dit), expected)


@pytest.mark.parametrize("held", [{"quantization": "int8"}, {"swapped": 3}])
def test_held_weights_are_no_part_of_the_state_and_merge_like_parameters(held: dict[str, Any]) -> None:
    plain = dequantized("int8") if "quantization" in held else build()
    dit = build()
    hold_frozen_weights(dit, device=CPU, **held)
    absent = plain.state_dict().keys() - dit.state_dict().keys()
    assert absent == {f"{name}.weight" for name in frozen(dit)}
    for each in (dit, plain):
        merge_adapters(each.eval())
    assert_equal([dit(*inputs())], [plain(*inputs())])
    assert dit.state_dict().keys() == plain.state_dict().keys()


def test_weights_that_train_stay_parameters() -> None:
    dit = build()
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "layers.1.mlp" in name)
    hold_frozen_weights(dit, device=CPU, quantization="nf4")
    names = {name for name, _ in adapted_layers(dit)}
    assert names - frozen(dit).keys() == {name for name in names if "layers.1.mlp" in name}
