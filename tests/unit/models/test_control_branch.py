"""Laws of the built-in branches: they begin as the base, copies compute the base, and they are checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sat_train.config import ModelSpec
from sat_train.config.parts.module_parts import ControlBranchParams, ModuleConfig, PixelControlBranchParams
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.networks import add_adapters
from tests.unit.models.test_build import load
from tests.unit.models.test_stack import inputs

LAYERS = 4
CONTROL = 5  # channels


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    own = load("model/cogvideox_tiny").spec
    return dataclasses.replace(own, layers=LAYERS, condition_widths={"control": CONTROL})


def network(spec: ModelSpec, noise: float = 0.1, **options: object) -> DiffusionTransformer:
    dit = build_dit(dataclasses.replace(spec, modules={}), device="cpu", dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return dit


def branch(spec: ModelSpec, **params: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return ModuleConfig.of("ControlBranch", params).build(spec)


def control() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"control": torch.randn(2, 2, CONTROL, 4, 6, generator=generator)}


SORTS = [{"blocks": 2}, {"blocks": 2, "spread": True}, {"blocks": 3, "heads": 1}]


@pytest.mark.parametrize("params", SORTS, ids=str)
def test_it_begins_as_the_base_and_every_weight_gets_a_gradient(spec, params):
    base, dit = network(spec), network(spec)
    dit.add_mixin("control", branch(spec, **params), reinit=False)
    dit.mixins["control"].reinit(dit)
    v = dit(*inputs(spec), extras=control())
    assert torch.equal(v, base(*inputs(spec)))
    v.square().mean().backward()
    missing = [name for name, parameter in dit.named_parameters() if parameter.grad is None]
    assert not missing
    projections = dit.mixins["control"].per_block
    assert len(projections) == (LAYERS if params.get("spread") else params["blocks"])
    assert all(projection.weight.grad.any() for projection in projections.values())


def test_its_blocks_are_those_of_the_base_also_under_adapters(spec):
    dit = network(spec)
    add_adapters(dit, rank=2)
    dit.add_mixin("control", branch(spec, blocks=2))
    dit.mixins["control"].reinit(dit)
    for own, base in zip(dit.mixins["control"].stack.blocks, dit.blocks[:2], strict=True):
        for name, module in own.modules().items():
            weights = base.modules()[name].state_dict()
            assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())
    assert not any("matrix" in key for key in dit.mixins["control"].state_dict())


def test_an_open_branch_is_felt_at_video_tokens_and_groups_are_equal(spec):
    dit = network(spec)
    module = branch(spec, blocks=2, spread=True)
    assert module.sources == {0: 0, 1: 0, 2: 1, 3: 1}
    dit.add_mixin("control", module)
    with torch.no_grad():
        for projection in module.per_block.values():
            projection.weight.normal_(std=0.1)
    given = control()
    v = dit(*inputs(spec), extras=given)
    given["control"][1] += 1
    changed = dit(*inputs(spec), extras=given)
    assert torch.equal(changed[0], v[0]), "each sample has its own control"
    assert not torch.allclose(changed[1], v[1], atol=1e-3)


def test_it_is_recomputed_and_compiled_as_the_base_is(spec):
    torch._dynamo.reset()
    counters.clear()
    results = []
    for recompute, backend in (("off", None), ("full", None), ("full", "aot_eager")):
        dit = network(spec, recompute=recompute)
        dit.add_mixin("control", branch(spec, blocks=2, spread=True))
        with torch.no_grad():
            for projection in dit.mixins["control"].per_block.values():
                projection.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        if backend:
            dit.compile_blocks(backend=backend)
        dit(*inputs(spec), extras=control()).square().mean().backward()
        results.append({name: parameter.grad for name, parameter in dit.named_parameters()})
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # blocks with the branch, and those of the branch
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name
        bound = 1e-5 * max(gradient.abs().max().item(), 1e-3)  # aot_eager may add in the other order
        assert torch.allclose(results[2][name], gradient, rtol=1e-5, atol=bound), name


def test_its_settings_are_checked_against_the_model(spec):
    def faults(**params: object) -> dict[str, str]:
        return dict(ControlBranchParams(**params).check(spec))

    assert faults() == {"blocks": "at most the 4 blocks of the model"}
    assert faults(blocks=2) == {}
    assert faults(blocks=2, channels=CONTROL) == {}
    assert faults(blocks=2, channels=4) == {"channels": "5, the channels of the condition control"}
    assert "which states none" in faults(blocks=2, condition="other")["channels"]
    assert faults(blocks=2, condition="other", channels=7) == {}


@pytest.mark.parametrize("params", [{"blocks": 2}, {"blocks": 3, "heads": 1}], ids=str)
def test_a_branch_on_pixels_begins_as_the_base_and_every_weight_gets_a_gradient(spec, params):
    spec = dataclasses.replace(spec, condition_widths={"control": 3 * 4 * 8**2})
    base, dit = network(spec), network(spec)
    module = ModuleConfig.of("PixelControlBranch", params).build(spec)
    dit.add_mixin("control", module)
    module.reinit(dit)
    given = {"control": torch.rand(2, 2, 3 * 4 * 8**2, 4, 6, generator=torch.Generator().manual_seed(3))}
    v = dit(*inputs(spec), extras=given)
    assert torch.equal(v, base(*inputs(spec)))
    is_copy = "heads" not in params
    for own, theirs in (
        (module.embed.time_embed, dit.time_embed),
        (module.stack.blocks[1].layer, dit.blocks[1].layer),
    ):
        equal = [torch.equal(*pair) for pair in zip(own.parameters(), theirs.parameters(), strict=True)]
        assert all(equal) == is_copy
    of_latent = slice(None), slice(spec.out_channels)
    projections = (
        each.proj.weight[of_latent] for each in (module.embed.patch_embed, dit.mixins["patch_embed"])
    )
    assert not is_copy or torch.equal(*projections)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # open projections and gates
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    dit(*inputs(spec), extras=given).square().mean().backward()
    assert not [name for name, parameter in dit.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.any() for parameter in module.embed.parameters())


def test_the_settings_of_a_branch_on_pixels_are_checked_against_the_model(spec):
    def faults(**params: object) -> dict[str, str]:
        pixels = dataclasses.replace(spec, condition_widths={"control": 768, "latent": 16})
        return dict(PixelControlBranchParams(**params).check(pixels))

    assert faults(blocks=2) == faults(blocks=2, heads=1) == faults(blocks=2, projections=False) == {}
    assert faults() == {"blocks": "at most the 4 blocks of the model"}
    assert "are not as wide" in faults(blocks=2, heads=1, projections=False)["projections"]
    for name in ("latent", "other"):
        assert faults(blocks=2, condition=name) == {
            "condition": "a condition that gives modules pixels: ControlPixels"
        }


def test_its_initial_weights_depend_on_seed_and_name_alone(spec):
    def built(seed: int, *names: str) -> dict[str, Tensor]:
        modules = {name: ModuleConfig.of("ControlBranch", {"blocks": 1, "heads": 1}) for name in names}
        own = dataclasses.replace(spec, modules=modules)
        torch.randn(7)  # the state of the global generator has no effect
        return build_dit(own, device="cpu", dtype=torch.float32, seed=seed).state_dict()

    first, alone = built(1, "a", "b"), built(1, "b")
    own = [key for key in alone if key.startswith("mixins.b.")]
    assert own
    assert all(torch.equal(first[key], alone[key]) for key in own)
    key = "mixins.b.stack.transformer.layers.0.attention.query_key_value.weight"
    assert not torch.equal(first[key], first[key.replace(".b.", ".a.")])
    assert not torch.equal(first[key], built(2, "b")[key])
