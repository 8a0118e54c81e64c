"""Weights of a base in a model that has more: it computes what the base does, and a table says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sat_train.errors import CheckpointError, ConfigError
from sat_train.interchange.locate import load_weights
from sat_train.interchange.surgery import (
    Surgery,
    describe_surgery,
    fill_absent,
    fit_weights,
    versions,
)
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.trainable import select_trainable
from sat_train.training.models import check_zeros_train
from sat_train.weights.lazy import LazyWeights, from_tensors
from tests.networks import add_adapters, build_network
from tests.unit.models.narrow import randomized

ONE = {"positions": "rotary"}
JOINT = {"positions": "rotary", "patch": (2, 2, 2), "latent_size": (6, 4, 6)}
I2V = {"in_channels": 8}


def weights_of(dit: DiffusionTransformer) -> LazyWeights:
    return from_tensors(dit.state_dict(), where="base.pt")


def converted(base: DiffusionTransformer, **numbers: object) -> tuple[DiffusionTransformer, frozenset[str]]:
    """Returns a model with the base's weights, and the names that these lack; the others are not a number."""
    dit = build_network(**numbers, init_seed=None)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.fill_(torch.nan)
    fitted = fit_weights(dit, weights_of(base))
    load_weights(dit, fitted.weights, may_lack=dit.derived_keys() | fitted.absent)
    fill_absent(dit, fitted.absent, seed=3)
    return dit, fitted.absent


def inputs(frames: int = 3, text: int = 5, patch_frames: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, frames * patch_frames, 4, 4, 6, generator=generator)
    return latent, torch.tensor([7, 901]), torch.randn(2, text, 12, generator=generator)


@pytest.mark.parametrize("kind", [ONE, JOINT, {"positions": "sincos"}], ids=["1.0", "1.5", "sincos"])
@pytest.mark.parametrize(
    ("own", "own_channels"),
    [({"condition_channels": 4}, 8), ({"condition_channels": 12}, 16), ({"condition_channels": 3}, 7)],
)
def test_a_widened_model_computes_what_its_base_does(kind, own, own_channels):
    base = randomized(**kind)
    wide, _ = converted(base, **kind, **own, in_channels=own_channels)
    latent, timesteps, text = inputs(patch_frames=2 if kind is JOINT else 1)
    channels = torch.randn(*latent.shape[:2], own_channels - 4, 4, 6)
    expected = base(latent, timesteps, text)
    actual = wide(latent, timesteps, text, channels_btchw=channels)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (ONE, {"positions": "rotary_learned"}),
        (JOINT, {"ofs_width": 16}),
        (ONE, {"condition_channels": 8, "in_channels": 16}),
    ],
    ids=["5B-I2V", "1.5-I2V", "I2V with further channels"],
)
def test_text_to_video_becomes_image_to_video_at_the_same_output(kind, more):
    base = randomized(**kind)
    dit, absent = converted(base, **(kind | I2V | more))
    latent, timesteps, text = inputs(patch_frames=2 if kind is JOINT else 1)
    image = torch.randn(*latent.shape[:2], 4, 4, 6)
    rest = torch.randn(*latent.shape[:2], 8, 4, 6) if "condition_channels" in more else None
    ofs = torch.tensor([2.0, 0.0]) if kind is JOINT else None
    actual = dit(latent, timesteps, text, image, ofs, channels_btchw=rest)
    assert torch.allclose(actual, base(latent, timesteps, text), rtol=0, atol=1e-5)
    assert len(absent) == {True: 4, False: "positions" in more}[kind is JOINT]
    assert kind is not JOINT or dit.ofs_embed[0].weight.any(), "the layer behind it is zero, so it can learn"


def test_image_to_video_weights_keep_their_image_and_get_further_channels():
    base = randomized(**I2V)
    dit, _ = converted(base, in_channels=12, condition_channels=4)
    latent, timesteps, text = inputs()
    image, rest = torch.randn_like(latent), torch.randn_like(latent)
    expected = base(latent, timesteps, text, image)
    actual = dit(latent, timesteps, text, image, channels_btchw=rest)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [3, 5, 9])
def test_the_length_of_the_text_may_change(length):
    base = randomized(positions="rotary_learned")
    dit, _ = converted(base, positions="rotary_learned", text_length=length)
    args = inputs(text=min(length, 5))
    assert torch.equal(dit(*args), base(*args))


@pytest.mark.parametrize(("frames", "area"), [(2, (64, 72)), (3, (4, 6)), (7, (4, 6))])
def test_a_learned_table_of_positions_takes_another_number_of_frames(frames, area):
    size = {"positions": "rotary_learned", "size_policy": "interpolate"}
    base = randomized(**size, latent_size=(3, *area))
    dit, _ = converted(base, **size, latent_size=(frames, *area))
    grid = PatchGrid(frames, area[0] // 2, area[1] // 2)
    assert torch.equal(dit.mixins["pos_embed"](grid, 5), base.mixins["pos_embed"](grid, 5))


@pytest.mark.parametrize(
    ("base", "own", "says"),
    [
        (I2V, {}, r"reads 8 channels and the model 4: .*not known(.|\n)*read 4 channels"),
        ({"in_channels": 6}, {"in_channels": 16, "condition_channels": 8}, "read 4 or 8 or 16 channels"),
        ({}, {"latent_size": (3, 8, 6)}, r"has 23 rows, the model's 41(.|\n)*another height or width"),
        ({}, {"latent_size": (2, 4, 6)}, r"has 23 rows, the model's 17"),  # of text, or of a third frame?
        ({}, {"ofs_width": 16}, r"4 missing(.|\n)*ofs_embed\.0\.weight"),
        ({"width": 128}, I2V, "mismatched  mixins.final_layer.linear"),
        ({"layers": 1}, I2V, r"missing     transformer\.layers\.1"),
    ],
)
def test_a_wrong_conversion_is_refused_by_name(base, own, says):
    table = {"positions": "rotary_learned"}
    with pytest.raises(CheckpointError, match=says):
        converted(randomized(**(table | base)), **(table | own))


def test_a_table_says_what_is_copied_zeroed_and_new():
    base, kind = randomized(**JOINT), JOINT | I2V | {"ofs_width": 16}
    dit = build_network(**kind)
    fitted = fit_weights(dit, weights_of(base))
    load_weights(dit, fitted.weights, may_lack=dit.derived_keys() | fitted.absent)
    fill_absent(dit, fitted.absent, seed=0)
    before = versions(dit)
    dit.time_embed[2].bias.data.add_(0)
    counts = describe_surgery(dit, weights_of(base).shapes, before).counts
    width, patch = 64, 8
    projection = 4 * patch * width  # of each half of the channels
    copied = projection + width + 12 * width + width  # the bias, and the projection of the text
    assert counts["mixins.patch_embed"] == [copied, projection, 0]
    assert counts["ofs_embed"] == [0, 16 * 16 + 16, 16 * 16 + 16]
    assert counts["transformer.layers"][1:] == [0, 0]
    total = sum(sum(row) for row in counts.values())
    assert total == sum(parameter.numel() for parameter in dit.parameters())


def test_channels_that_begin_at_zero_must_train():
    dit = randomized(**I2V)
    surgery = Surgery(frozenset(), channels=4, projection=torch.zeros(1))
    add_adapters(dit, rank=2)
    select_trainable(dit, not_trainable_prefixes=["all"])
    with pytest.raises(ConfigError, match=r"patch_embed\.proj\.weight = frozen: .* read 4 of 8 channels"):
        check_zeros_train(dit, surgery)
    widened = randomized(**I2V, condition_channels=4)
    select_trainable(widened, not_trainable_prefixes=["all"], added=widened.added_prefixes())
    check_zeros_train(widened, surgery)
    trained = {name for name, parameter in widened.named_parameters() if parameter.requires_grad}
    assert trained == {"mixins.patch_embed.proj.weight", "mixins.patch_embed.proj.bias"}
