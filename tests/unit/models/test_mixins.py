"""Laws of network modules: where they act, that their order decides nothing, what they may not do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sat.model.base_model import BaseMixin
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sat_train.errors import ConfigError
from sat_train.models.dit.block import mlp_forward
from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.unit.models.mixins import (
    LAYERS,
    WIDTH,
    Branch,
    Doubling,
    Fuser,
    Head,
    PlusOne,
    Remembering,
    context_of,
    one_in,
    several,
    with_modules,
)
from tests.unit.models.narrow import inputs


def results(dit: DiffusionTransformer, **options: object) -> dict[str, Tensor]:
    """Returns v, the outputs of taps, and the gradient of every weight."""
    v, outputs = dit(*inputs(), return_outputs=True, **options)
    (v.square().mean() + sum(output.square().mean() for output in outputs.values())).backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "every weight gets a gradient"
    return {"v": v.detach(), **{name: output.detach() for name, output in outputs.items()}, **gradients}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() >= expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]


@pytest.mark.parametrize("positions", ["sincos", "rotary", "rotary_learned"])
def test_modules_that_add_zero_leave_output_and_gradients_of_the_base_bit_for_bit(positions):
    base = with_modules({}, positions=positions)
    modules = {"control": Branch(0, 2, zero=True), "motion": Fuser(0, 3, zero=True), "head": Head()}
    extended = with_modules(modules, positions=positions)
    v, outputs = extended(*inputs(), return_outputs=True)
    assert set(outputs) == {f"head_{block}" for block in range(LAYERS)}
    v.square().mean().backward()
    expected = results(base)
    assert torch.equal(v, expected.pop("v"))
    assert_same_bits({name: p.grad for name, p in extended.named_parameters()}, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_order_in_which_modules_are_added_changes_no_bit(checkpointing):
    modules = several()
    forwards = with_modules(copy.deepcopy(modules), recompute="full" if checkpointing else "off")
    backwards = with_modules(dict(reversed(modules.items())), recompute="full" if checkpointing else "off")
    assert_same_bits(results(backwards), results(forwards))
    assert backwards.hook_origins == forwards.hook_origins
    assert forwards.hook_origins["after_block"] == "audio + control"


def test_activation_checkpointing_changes_no_bit_of_taps_and_modules():
    plain = with_modules({**several(), "head": Head()})
    saving = with_modules({**several(), "head": Head()}, recompute="full")
    assert_same_bits(results(saving), results(plain))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tap_sees_what_each_block_gives_to_the_next(checkpointing):
    seen: list[Tensor] = []

    class Tap(Mixin):
        def tap(self, hidden_bld, block, forward):
            assert len(seen) == block.index
            seen.append(hidden_bld)

    dit = with_modules({**several(), "tap": Tap()}, recompute="full" if checkpointing else "off")
    v, _ = dit(*inputs(), return_outputs=True)
    v.sum().backward()
    assert len(seen) == LAYERS, "the backward computes blocks again, and taps nothing"
    normed = dit.transformer.final_layernorm(seen[-1][:, 5:])
    emb = dit.time_features(inputs()[1])
    assert torch.equal(dit.mixins["final_layer"].final_forward(normed, emb, PatchGrid(3, 2, 3)), v)
    assert torch.equal(dit(*inputs()), v), "without outputs nothing is tapped"
    assert len(seen) == LAYERS


def test_blocks_with_the_same_modules_share_one_compiled_graph():
    """With recomputation; without it, `test_network_laws.py` counts the graphs."""
    torch._dynamo.reset()
    counters.clear()
    modules = {"control": Branch(0, 1, 3), "audio": Branch(*range(LAYERS)), "reference": Remembering(0, 3)}
    eager = with_modules(copy.deepcopy(modules), recompute="full")
    compiled = with_modules(modules, recompute="full")
    compiled.compile_blocks(backend="aot_eager")
    expected, actual = results(eager), results(compiled)
    assert not counters["graph_break"]
    # blocks 0 and 3 are alike; 1 has no reference, 2 the audio branch alone
    assert counters["stats"]["unique_graphs"] == 3
    compiled(*inputs())
    assert counters["stats"]["unique_graphs"] == 3
    for name, tensor in expected.items():
        # the same operations; aot_eager may add two gradients in the other order
        assert torch.allclose(actual[name], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item()), name


def test_two_modules_around_one_step_need_an_order():
    with pytest.raises(ConfigError, match=r"hook_order.*mlp_forward: \[one, twice\], outermost first"):
        with_modules({"one": PlusOne(), "twice": Doubling()})
    apart = {"one": one_in(0), "twice": one_in(1)}
    assert with_modules(apart).hook_origins["mlp_forward"] == "one -> twice -> block", "no block has both"


@pytest.mark.parametrize("outermost", ["twice", "one"])
def test_the_module_that_is_named_first_is_outermost(outermost):
    order = {"mlp_forward": sorted(["twice", "one"], reverse=outermost == "twice")}
    modules = {"one": PlusOne(), "twice": Doubling()}
    block = with_modules(modules, hook_order=order).blocks[2]
    base = with_modules({})
    x_bld, context = torch.randn(2, 23, WIDTH), context_of(base)
    y_bld = base.blocks[2].run(mlp_forward, x_bld, context=context)
    expected = 2 * (1 + y_bld) if outermost == "twice" else 1 + 2 * y_bld
    assert torch.equal(block.run(mlp_forward, x_bld, context=context), expected)


def test_attention_gets_queries_and_keys_normalised_and_rotated():
    class Own(Mixin):
        def attention_fn(self, query, key, value, *, part, block, context, old_impl):
            return F.scaled_dot_product_attention(query, key, value)

    assert torch.equal(with_modules({"own": Own()})(*inputs()), with_modules({})(*inputs()))


def test_a_module_may_stand_around_the_whole_block_and_the_ends_of_the_model():
    class Skip(Mixin):
        def layer_forward(self, x_bld, *, part, block, context, old_impl):
            return x_bld

        def word_embedding_forward(self, latent_btchw, text_bld, *, forward, old_impl):
            return old_impl(2 * latent_btchw, text_bld)

        def position_embedding_forward(self, grid, text_length, *, forward, old_impl):
            forward.outputs["grid"] = torch.tensor(grid)
            return old_impl(grid, text_length)

        def final_forward(self, video_bld, emb_bd, grid, *, forward, old_impl):
            forward.outputs["video"] = video_bld
            return -old_impl(video_bld, emb_bd, grid)

    latent, timesteps, text = inputs()
    dit = with_modules({"skip": Skip()}, positions="sincos")
    v, outputs = dit(latent, timesteps, text, return_outputs=True)
    tokens = dit.embed(2 * latent, text)
    assert outputs["grid"].tolist() == [3, 2, 3]
    assert torch.equal(outputs["video"], dit.transformer.final_layernorm(tokens[:, 5:]))
    final = dit.mixins["final_layer"].final_forward(
        outputs["video"], dit.time_features(timesteps), PatchGrid(3, 2, 3)
    )
    assert torch.equal(v, -final)


def test_what_a_module_adds_to_the_time_features_modulates_the_blocks():
    class Later(Mixin):
        def time_features(self, forward):
            return forward.dit.time_features(torch.full_like(forward.timesteps_b, 7))

    seen: list[Tensor] = []

    class Emb(Mixin):
        def before_blocks(self, hidden_bld, forward):
            seen.append(forward.block.emb_bd)

    dit = with_modules({"later": Later(), "emb": Emb()})
    dit(*inputs())
    base = with_modules({})
    expected = base.time_features(inputs()[1]) + base.time_features(torch.tensor([7, 7]))
    assert torch.equal(seen[0], expected)


def test_a_module_may_embed_another_sequence_as_the_base_does():
    seen: list[tuple[Tensor, BlockContext]] = []

    class Other(Mixin):
        def before_blocks(self, hidden_bld, forward):
            seen.append(forward.embed(forward.latent_btchw, forward.text_bld, forward.timesteps_b))
            seen.append((hidden_bld, forward.block))
            patches = forward.patches(forward.latent_btchw[:, :, :3])
            assert patches.shape == (2, 3, 2, 3, 3 * 4)

    with_modules({"other": Other()}, positions="rotary_learned")(*inputs())
    (tokens, context), (base_tokens, base_context) = seen
    assert torch.equal(tokens, base_tokens)
    assert torch.equal(context.emb_bd, base_context.emb_bd)
    assert context.grid == base_context.grid


def test_what_a_model_cannot_run_is_refused_when_it_is_added():
    class Loose(Mixin):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    class Foreign(BaseMixin):
        def mlp_forward(self, hidden_states, **kw_args):
            return hidden_states

    refused = {
        r"no parameter directly on the mixin: put scale into a module with a forward": Loose(),
        r"per_block of blocks 0 to 3, not 4": Fuser(0, 4),
        r"a class derived from Mixin, since it has mlp_forward": Foreign(),
    }
    for message, mixin in refused.items():
        with pytest.raises(ConfigError, match=rf"modules\.extra.*{message}"):
            with_modules({"extra": mixin})
    with pytest.raises(ConfigError, match=r"modules\.half.*another name than half"):
        with_modules({"half": Fuser(0)})


def test_a_module_that_is_taken_away_leaves_the_base():
    dit = with_modules(several())
    for name in several():
        dit.del_mixin(name)
    assert torch.equal(dit(*inputs()), with_modules({})(*inputs()))


def test_a_copy_of_an_extended_model_computes_with_its_own_modules():
    dit = with_modules(several())
    expected, twin = dit(*inputs()), copy.deepcopy(dit)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.zero_()
    assert torch.equal(twin(*inputs()), expected)
