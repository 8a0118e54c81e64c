"""Every shipped model file builds, on the meta device, into the weights of the released model."""

from pathlib import Path

import pytest
import torch

from sat_train.config import RunConfig, load_run_config
from sat_train.models.adapter import adapter_state_dict
from sat_train.models.build import build_dit
from sat_train.models.trainable import select_trainable
from tests.parity.families import FAMILIES, Family

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TINY = {"cogvideox_tiny", "cogvideox_tiny_i2v", "cogvideox1.5_tiny", "cogvideox1.5_tiny_i2v"}
MODEL_FILES = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def load(*files: str, words: tuple[str, ...] = ()) -> RunConfig:
    return load_run_config(
        [CONFIGS / f"{name}.yaml" for name in files], words, purpose="check", check_paths=False
    )


def file_of(family: Family) -> str:
    return f"cogvideox{family.name}" if family.name[0:2] == "1." else f"cogvideox_{family.name}"


def test_every_member_of_the_family_has_a_file():
    assert {file_of(family) for family in FAMILIES} | TINY == set(MODEL_FILES)


@pytest.mark.parametrize("family", FAMILIES, ids=file_of)
def test_a_model_file_builds_the_released_weights(family):
    """The expected shapes are those of the model that equals diffusers' full-size one (tests/parity)."""
    spec = load(f"model/{file_of(family)}").spec
    built = build_dit(spec, device="meta", dtype=torch.bfloat16).state_dict()
    expected = family.ours(device="meta", dtype=torch.bfloat16).state_dict()
    assert {key: value.shape for key, value in built.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_lora_works_in_front_of_every_model_file(name):
    config = load(f"model/{name}", "lora")
    spec = config.spec
    dit = build_dit(spec, device="meta", dtype=torch.bfloat16)
    weights = adapter_state_dict(dit)
    matrices = {key: value for key, value in weights.items() if "matrix" in key}
    assert len(matrices) == 8 * spec.layers
    assert {value.dtype for value in matrices.values()} == {torch.float32}
    summary = select_trainable(dit, not_trainable_prefixes=config.model.not_trainable_prefixes)
    assert summary.num_trainable == 8 * spec.layers * spec.adapter.params.r * spec.width


def test_settings_reach_the_transformer():
    path = "model.network_config.params"
    words = (f"{path}.modules.pos_embed_config.params.size_policy=interpolate",)
    dit = build_dit(
        load("model/cogvideox_2b", words=words).spec,
        device="meta",
        dtype=torch.float32,
        recompute="full",
    )
    assert dit.recompute == "full"
    assert dit.mixins["pos_embed"].size_policy == "interpolate"
    assert dit.mixins["pos_embed"].interpolation == (1.0, 1.875, 1.875)


def test_the_tiny_model_starts_from_its_seed():
    spec = load("model/cogvideox_tiny").spec
    first, same, other = (build_dit(spec, device="cpu", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    key = "time_embed.0.weight"
    assert torch.equal(first.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
