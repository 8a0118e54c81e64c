"""Our transformer against diffusers', the independent source: outputs, all gradients, keys and shapes."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from sat_train.distributed.processes import start_single_process
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.trainable import summarize_parameters
from sat_train.weights.diffusers_keys import transformer_from_diffusers, transformer_to_diffusers
from tests.parity.families import FAMILIES, Family, randomize

# fp32 sums in another order: 2 layers of width 128 agree to about 1e-6 of their scale
TOLERANCE = 1e-5

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def _one_process() -> None:
    start_single_process()


class Rotary(CogVideoXImageToVideoPipeline):
    """diffusers' pipeline, only for the rotary tables it computes."""

    def __init__(self, transformer: CogVideoXTransformer3DModel) -> None:
        self.transformer = transformer
        self.vae_scale_factor_spatial = 1

    def tables(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return self._prepare_rotary_positional_embeddings(height, width, frames, torch.device("cpu"))


def relative_error(actual: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """Returns the largest difference over the largest expected value, or over `floor` if that is larger."""
    difference, scale = (actual - expected).abs().max(), expected.abs().max()
    return float((difference / scale.clamp(min=floor)).detach())


def pair(family: Family, **options: object) -> tuple[DiffusionTransformer, CogVideoXTransformer3DModel]:
    """Builds both sides with the same random weights, ours converted from theirs."""
    theirs, ours = family.theirs().float(), family.ours(**options)  # its position table is made in fp64
    randomize(theirs, seed=1)
    if family.positions == "rotary_learned":
        theirs.patch_embed.pos_embedding.normal_(generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights = transformer_from_diffusers(theirs.state_dict())
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert set(missing) == ours.derived_keys()
    assert unexpected == []
    return ours, theirs


def inputs(family: Family, latent_size: tuple[int, int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    frames, height, width = latent_size
    return {
        "latent": torch.randn(2, frames, family.in_channels, height, width, generator=generator),
        "text": torch.randn(2, family.text_length, family.text_width, generator=generator),
        "timesteps": torch.tensor([7, 901]),
        "ofs": torch.tensor([2.0, 1.0]),
    }


def run_ours(ours: DiffusionTransformer, family: Family, given: dict[str, Tensor]) -> Tensor:
    latent, image = given["latent"].split(
        [family.out_channels, family.in_channels - family.out_channels], dim=2
    )
    return ours(
        latent,
        given["timesteps"],
        given["text"],
        image if family.image_to_video else None,
        given["ofs"] if family.ofs else None,
    )


def run_theirs(theirs: CogVideoXTransformer3DModel, family: Family, given: dict[str, Tensor]) -> Tensor:
    frames, _, height, width = given["latent"].shape[1:]
    tables = None if family.positions == "sincos" else Rotary(theirs).tables(frames, height, width)
    ofs = given["ofs"] if family.ofs else None
    return theirs(given["latent"], given["text"], given["timesteps"], ofs=ofs, image_rotary_emb=tables).sample


@by_family
def test_output_and_all_gradients_equal_diffusers(family: Family) -> None:
    family = family.narrow()
    ours, theirs = pair(family)
    given = inputs(family, family.latent_size)
    actual, expected = run_ours(ours, family, given), run_theirs(theirs, family, given)
    assert relative_error(actual, expected) < TOLERANCE
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    for output in (actual, expected):
        (output - target).square().mean().backward()
    gradients = dict(theirs.named_parameters())
    if family.positions == "rotary_learned":  # a buffer there
        gradients["patch_embed.pos_embedding"] = theirs.patch_embed.pos_embedding
    expected_gradients = transformer_from_diffusers({key: value.grad for key, value in gradients.items()})
    assert expected_gradients.keys() == dict(ours.named_parameters()).keys()
    # a bias of all keys moves no attention weight unless it is rotated: its gradient is zero, noise in fp32
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for key, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected_gradients[key], floor=floor) < TOLERANCE, key


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[3]], ids=lambda family: family.name)
@pytest.mark.parametrize("latent_size", [(3, 8, 12), (5, 6, 14), (2, 12, 10), (4, 16, 8)], ids=str)
def test_other_sizes_equal_diffusers(family: Family, latent_size: tuple[int, int, int]) -> None:
    """Sincos and rotary positions follow diffusers to any size; diffusers refuses that of a learned table."""
    family = family.narrow()
    frames = latent_size[0] + latent_size[0] % family.patch_frames
    ours, theirs = pair(family, size_policy="interpolate")
    given = inputs(family, (frames, *latent_size[1:]))
    with torch.no_grad():
        error = relative_error(run_ours(ours, family, given), run_theirs(theirs, family, given))
    assert error < TOLERANCE


@by_family
def test_weights_come_back_bit_equal(family: Family) -> None:
    family = family.narrow()
    ours, theirs = pair(family)
    back = transformer_to_diffusers(ours.state_dict(), learned_positions=family.positions == "rotary_learned")
    expected = theirs.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)


@by_family
def test_full_size_keys_and_shapes_equal_diffusers(family: Family) -> None:
    """Both sides on the meta device: seconds and megabytes for 5.6 billion weights."""
    with torch.device("meta"):
        theirs = family.theirs()
    ours = family.ours(device="meta", dtype=torch.bfloat16)
    assert {str(value.device) for value in ours.state_dict().values()} == {"meta"}
    back = transformer_to_diffusers(ours.state_dict(), learned_positions=family.positions == "rotary_learned")
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in back.items()} == expected
    learned = theirs.patch_embed.pos_embedding.numel() if family.positions == "rotary_learned" else 0
    assert summarize_parameters(ours).num_trainable == theirs.num_parameters() + learned
