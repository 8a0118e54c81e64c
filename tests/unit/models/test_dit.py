"""Laws of the transformer that need no other implementation."""

import copy
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sat_train.errors import ConfigError
from sat_train.models.dit.elementwise import rotate_pairs
from sat_train.models.dit.embedding import PatchGrid, timestep_features
from sat_train.models.dit.rotary import RotaryPositions, rotary_angles
from sat_train.models.dit.sincos import sincos_table
from tests.networks import SMALL, build_network
from tests.unit.models.narrow import inputs, randomized


def test_every_hook_of_sat_says_whose_step_it_is():
    assert build_network().hook_origins == {
        "word_embedding_forward": "patch_embed",
        "position_embedding_forward": "pos_embed",
        "layer_forward": "block",
        "attention_forward": "block",
        "attention_fn": "block",
        "mlp_forward": "block",
        "final_forward": "final_layer",
    }


def test_state_dict_keys_are_sat_s():
    keys = set(build_network(layers=1, positions="rotary_learned", ofs_width=16).state_dict())
    linear = {
        "transformer.layers.0.input_layernorm",
        "transformer.layers.0.attention.query_key_value",
        "transformer.layers.0.attention.dense",
        "transformer.layers.0.post_attention_layernorm",
        "transformer.layers.0.mlp.dense_h_to_4h",
        "transformer.layers.0.mlp.dense_4h_to_h",
        "transformer.final_layernorm",
        "time_embed.0",
        "time_embed.2",
        "ofs_embed.0",
        "ofs_embed.2",
        "mixins.patch_embed.proj",
        "mixins.patch_embed.text_proj",
        "mixins.adaln_layer.adaLN_modulations.0.1",
        "mixins.adaln_layer.query_layernorm_list.0",
        "mixins.adaln_layer.key_layernorm_list.0",
        "mixins.final_layer.norm_final",
        "mixins.final_layer.linear",
        "mixins.final_layer.adaLN_modulation.1",
    }
    expected = {f"{module}.{kind}" for module in linear for kind in ("weight", "bias")}
    assert keys == expected | {"mixins.pos_embed.pos_embedding"}
    assert build_network(layers=1, positions="sincos").derived_keys() == {"mixins.pos_embed.pos_embedding"}


def test_building_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    random.seed(3)
    before, python = torch.get_rng_state(), random.getstate()
    build_network()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert torch.get_default_dtype() == torch.float32


def test_initial_weights_are_a_function_of_the_seed_and_the_name():
    torch.manual_seed(1)
    first = build_network(init_seed=7).state_dict()
    torch.manual_seed(2)
    assert all(
        torch.equal(first[key], value) for key, value in build_network(init_seed=7).state_dict().items()
    )
    deeper = build_network(init_seed=7, layers=3).state_dict()
    shared = "transformer.layers.1.attention.query_key_value.weight"
    assert torch.equal(first[shared], deeper[shared])
    assert not torch.equal(first[shared], build_network(init_seed=8).state_dict()[shared])
    other_layer = "transformer.layers.0.attention.query_key_value.weight"
    assert not torch.equal(first[shared], first[other_layer])


def test_a_new_model_has_zero_gates_and_upstream_s_ranges():
    weights = build_network().state_dict()
    assert not any(value.any() for key, value in weights.items() if "adaLN_modulations" in key)
    assert weights["transformer.layers.0.mlp.dense_h_to_4h.weight"].std().item() == pytest.approx(
        0.02, rel=0.05
    )
    assert weights["transformer.layers.0.mlp.dense_4h_to_h.weight"].std().item() == pytest.approx(
        0.01, rel=0.05
    )
    xavier = (6 / (4 * 4 + 64)) ** 0.5
    assert weights["mixins.patch_embed.proj.weight"].abs().max().item() == pytest.approx(xavier, rel=0.05)
    assert weights["mixins.patch_embed.text_proj.bias"].abs().max().item() == pytest.approx(12**-0.5, rel=0.1)
    assert all(
        (value == 1).all() for key, value in weights.items() if "norm" in key and key.endswith("weight")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_its_weights(dtype):
    dit = randomized().to(dtype)
    assert dit.dtype == dtype
    output = dit(*inputs())
    assert output.dtype == dtype
    expected = randomized()(*inputs())
    # half types keep 8 and 11 bits; errors of a few of these steps pass through two blocks
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (output.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_builds_in_a_dtype(dtype):
    assert {
        value.dtype for value in build_network(dtype=dtype, positions="sincos").state_dict().values()
    } == {dtype}


def test_patch_weight_loads_in_either_shape():
    dit = randomized()
    weights = copy.deepcopy(dit.state_dict())
    key = "mixins.patch_embed.proj.weight"
    assert weights[key].shape == (64, 4, 2, 2)
    weights[key] = weights[key].flatten(1)
    other = build_network()
    other.load_state_dict(weights)
    assert torch.equal(other.state_dict()[key], dit.state_dict()[key])
    assert build_network(patch=(2, 2, 2), latent_size=(4, 4, 6)).state_dict()[key].shape == (64, 32)
    weights[key] = weights[key][:, :8]
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(weights)


class Operations(TorchDispatchMode):
    """Counts attention and matrix products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.attention += "attention" in name and "backward" not in name
        self.products += name in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", ["sincos", "rotary_learned"])
def test_recomputing_changes_no_number_and_computes_only_what_it_says(positions):
    mixed = ("full", "off", "attention", "gemm")
    policies = [(policy,) * 4 for policy in ("off", "gemm", "attention", "full")] + [mixed]
    settings = [(each, False) for each in policies] + [(each, True) for each in policies[1:]]
    dits = [randomized(positions=positions, layers=4, inputs_on_host=on_host) for _, on_host in settings]
    counts = []
    for dit, (each, _) in zip(dits, settings, strict=True):
        for block, policy in zip(dit.blocks, each, strict=True):
            block.layer.recompute = policy
        with Operations() as counted:
            dit(*inputs()).square().sum().backward()
        counts.append((counted.attention, counted.products))
        for (name, a), (_, b) in zip(dits[0].named_parameters(), dit.named_parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
    (_, products), again = counts[0], 4 * 5  # qkv, dense, two of the MLP and the modulation
    recomputed = [
        (4, products),
        (4, products + again),
        (8, products + again),
        (5, products + again // 2),
    ]
    assert counts == [(4, products), *recomputed, *recomputed]


@pytest.mark.parametrize("recompute", ["off", "gemm"])
def test_compiled_blocks_have_no_graph_break_and_the_same_gradients(recompute):
    """`aot_eager` traces forward and backward as Inductor does, without its minutes of code generation."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, compiled = randomized(layers=3), randomized(layers=3, recompute=recompute)
    compiled.compile_blocks(backend="aot_eager")
    for dit in (eager, compiled):
        dit(*inputs()).square().sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1, "layers share one graph"
    for (name, a), (_, b) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
        # the same operations; aot_eager may add two gradients in the other order
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-5 * a.grad.abs().max().item()), name


def test_a_copy_computes_with_its_own_weights():
    """Hooks and layers point at each other; in a copy they must not point at the source."""
    dit = randomized()
    before = dit(*inputs())
    twin = copy.deepcopy(dit)
    assert torch.equal(twin(*inputs()), before)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.zero_()
    assert torch.equal(twin(*inputs()), before)
    assert not torch.equal(dit(*inputs()), before)


def test_sampling_first_does_not_spoil_training():
    """Tables cached under inference mode would be refused by autograd."""
    dit = randomized()
    with torch.inference_mode():
        expected = dit(*inputs())
    actual = dit(*inputs())
    actual.sum().backward()
    assert torch.equal(actual, expected)


def test_sincos_refuses_or_computes_other_sizes():
    latent_size = (3, 6, 4)
    with pytest.raises(ConfigError, match=r"size_policy = refuse: expected 3x2x3 patches .* not 3x3x2"):
        build_network(positions="sincos")(*inputs(latent_size))
    with pytest.raises(ConfigError, match="not 4x2x3"):
        build_network(positions="sincos")(*inputs((4, 4, 6)))
    dit = build_network(positions="sincos", size_policy="interpolate", interpolation=(1.0, 1.5, 1.5))
    given = dit.mixins["pos_embed"].position_embedding_forward(PatchGrid(4, 3, 2), 5)
    formula = sincos_table(PatchGrid(4, 3, 2), 64, interpolation=(1.0, 1.5, 1.5))
    assert torch.equal(given[0, 5:], formula)
    assert not given[0, :5].any()


def test_fewer_frames_take_the_first_rows_of_a_table():
    for positions in ("sincos", "rotary_learned"):
        dit = randomized(positions=positions)
        table = dit.mixins["pos_embed"].pos_embedding
        given = dit.mixins["pos_embed"].position_embedding_forward(PatchGrid(2, 2, 3), 5)
        assert torch.equal(given, table[:, : 5 + 2 * 2 * 3])
        assert dit(*inputs((2, 4, 6))).shape == (2, 2, 4, 4, 6)


def test_a_learned_table_is_refused_or_interpolated_in_rows_and_columns():
    with pytest.raises(ConfigError, match="not 3x3x2"):
        build_network(positions="rotary_learned")(*inputs((3, 6, 4)))
    dit = build_network(positions="rotary_learned", size_policy="interpolate", latent_size=(2, 8, 8))
    table = dit.mixins["pos_embed"].pos_embedding
    rows = torch.arange(4.0)
    with torch.no_grad():  # each patch of the table holds frame, row and column
        t, h, w = torch.meshgrid(10 * torch.arange(2.0), rows, rows, indexing="ij")
        table[0, 5:, :3] = torch.stack([t, h, w], -1).flatten(0, 2)
    given = dit.mixins["pos_embed"].position_embedding_forward(PatchGrid(2, 2, 8), 5)[0, 5:, :3]
    frames, heights, widths = given.unflatten(0, (2, 2, 8)).unbind(-1)
    assert frames[:, 0, 0].tolist() == [0, 10], "as many frames: time is not stretched"
    assert heights[0, :, 0].tolist() == [0.5, 2.5], "half as many rows: the mean of two"
    assert widths[0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    grid = PatchGrid(2, 3, 4)
    angles = rotary_angles(grid, head_dim=32, base=grid, fit_to_base=False)
    query, key = torch.randn(2, 1, 1, 1, 32).expand(2, 1, grid.tokens, 1, 32)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    q, k = (rotate_pairs(x, rotation)[0, :, 0] for x in (query, key))
    assert torch.allclose(q.norm(dim=-1), query[0, :, 0].norm(dim=-1), rtol=1e-5)
    scores = (q @ k.T).unflatten(0, grid).unflatten(3, grid)
    # one frame, row and column on: the same distance, so the same score
    assert torch.allclose(scores[0, 0, 0, 0, 1, 2], scores[1, 1, 1, 1, 2, 3], atol=1e-4)


def test_rotary_positions_at_the_base_size_are_whole_numbers():
    base = PatchGrid(3, 30, 45)
    fitted = rotary_angles(base, head_dim=64, base=base, fit_to_base=True)
    assert torch.equal(fitted, rotary_angles(base, head_dim=64, base=base, fit_to_base=False))


def test_rotary_tables_are_made_once_for_a_size():
    dit = build_network()
    pos_embed = dit.mixins["pos_embed"]
    assert isinstance(pos_embed, RotaryPositions)
    dit(*inputs())
    device = torch.device("cpu")
    first = pos_embed.rotation(PatchGrid(3, 2, 3), 5, device)
    dit(*inputs())
    assert pos_embed.rotation(PatchGrid(3, 2, 3), 5, device) is first
    assert pos_embed.rotation(PatchGrid(2, 2, 3), 5, device).shape == (17, 16, 2)


def test_text_length_may_differ_from_the_table_s():
    latent, timesteps, text = inputs()
    for positions in ("sincos", "rotary", "rotary_learned"):
        output = randomized(positions=positions)(latent, timesteps, text[:, :3])
        assert output.shape == latent.shape


def test_timestep_features_are_cosines_then_sines_in_fp32():
    features = timestep_features(torch.tensor([0, 999], dtype=torch.int64), 4)
    assert features.dtype == torch.float32
    angles = torch.tensor([999.0, 999.0 * 0.01])
    assert torch.allclose(features[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-4)
    assert features[0].tolist() == [1, 1, 0, 0]


def test_meta_device_computes_shapes():
    dit = build_network(device="meta")
    latent, timesteps, text = (tensor.to("meta") for tensor in inputs())
    assert dit(latent, timesteps, text).shape == latent.shape
    assert SMALL["width"] == dit.spec.width
