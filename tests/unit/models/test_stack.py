"""Laws of a stack of blocks next to the transformer's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sat_train.config import ModelSpec
from sat_train.models.build import build_dit
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.sharding import tensor_parallel_layout
from sat_train.models.dit.stack import BlockStack
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.unit.models.test_build import load

LAYERS = 4


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return dataclasses.replace(load("model/cogvideox_tiny").spec, layers=LAYERS)


class Branch(Mixin):
    """As a ControlNet: a stack on the embedded tokens, each of whose states is added to one block."""

    def __init__(self, model: ModelSpec, *, layers: int, heads: int | None = None) -> None:
        super().__init__(model=model)
        self.stack = BlockStack(model, layers=layers, heads=heads)
        self.narrow = nn.Linear(model.width, self.stack.width)
        opened = {str(index): nn.Linear(self.stack.width, model.width) for index in range(layers)}
        self.per_block = nn.ModuleDict(opened)

    def before_blocks(self, hidden_bld, forward):
        return {self.name: self.stack.run(self.narrow(hidden_bld), forward)}

    def after_block(self, x_bld, *, part, block, context):
        return context.tokens(part(context.video(context.extras[self.name])))


class Copy(Mixin):
    """Runs copies of blocks 0 to 2 on what the base's get."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model=model)
        self.stack = BlockStack(model, layers=3)

    def reinit(self, dit=None):
        self.stack.copy_from(dit, range(3))

    def before_blocks(self, hidden_bld, forward):
        forward.outputs.update({f"copy_{i}": x for i, x in self.stack.run(hidden_bld, forward).items()})

    def tap(self, hidden_bld, block, forward):
        forward.outputs[f"base_{block.index}"] = hidden_bld


def network(spec: ModelSpec, **options: object) -> DiffusionTransformer:
    dit = build_dit(spec, device="cpu", dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return dit


def inputs(spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 2, spec.in_channels, 4, 6, generator=generator)
    return latent, torch.tensor([7, 901]), torch.randn(2, 8, spec.text_width, generator=generator)


def test_copied_blocks_compute_what_the_base_s_do(spec):
    dit = network(spec)
    dit.add_mixin("copy", Copy(spec), reinit=True)
    _, outputs = dit(*inputs(spec), return_outputs=True)
    assert all(torch.equal(outputs[f"copy_{index}"], outputs[f"base_{index}"]) for index in range(3))
    with torch.no_grad():
        dit.transformer.layers[0].mlp.dense_4h_to_h.weight.zero_()
    _, outputs = dit(*inputs(spec), return_outputs=True)
    assert not torch.equal(outputs["copy_0"], outputs["base_0"]), "a copy shares no weight"


def test_new_blocks_return_what_they_are_given_whatever_their_width(spec):
    seen: dict[int, Tensor] = {}

    class Narrow(Mixin):
        def __init__(self) -> None:
            super().__init__()
            self.stack = BlockStack(spec, layers=2, heads=1)

        def before_blocks(self, hidden_bld, forward):
            given = hidden_bld[..., : self.stack.width]
            seen.update(self.stack.run(given, forward))
            assert all(torch.equal(state, given) for state in seen.values())

    dit = network(spec)
    dit.add_mixin("narrow", Narrow())
    dit(*inputs(spec))
    assert [state.shape[-1] for state in seen.values()] == [64, 64]


def test_new_weights_follow_the_global_generator(spec):
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return BlockStack(spec, layers=2).state_dict()

    first, again, other = build(3), build(3), build(4)
    key = "transformer.layers.1.attention.query_key_value.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[key], other[key])
    assert tensor_parallel_layout(key) == tensor_parallel_layout(f"mixins.control.stack.{key}") == (0, 3)


def test_a_branch_is_compiled_and_checkpointed_as_the_base_is(spec):
    torch._dynamo.reset()
    counters.clear()
    results = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(5)
        dit = network(spec, recompute="full")
        dit.add_mixin("control", Branch(spec, layers=2))
        dit.add_mixin("camera", Branch(spec, layers=3, heads=1))
        if backend:
            dit.compile_blocks(backend=backend)
        dit(*inputs(spec)).square().mean().backward()
        results.append({name: parameter.grad for name, parameter in dit.named_parameters()})
    assert not counters["graph_break"]
    # blocks 0 and 1 of the base, block 2, block 3 with those of the branch of its width, and the narrow ones
    assert counters["stats"]["unique_graphs"] == 4
    for name, gradient in results[0].items():
        tolerance = 1e-5 * gradient.abs().max().item()  # aot_eager may add two gradients in the other order
        assert torch.allclose(results[1][name], gradient, rtol=1e-5, atol=tolerance), name
