"""Adapters as diffusers loads them, at scale 1.0, give what our own model gives; so do merged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file

from sat_train.config import ModelSpec
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError
from sat_train.interchange.adapters import is_adapter_key, read_given_lora, read_lora
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import read_transformer_weights
from sat_train.models.adapter import adapter_state_dict
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.loaded_adapters import load_updates
from tests.parity.presets import PRESETS, forward_pair, lora_words, narrow_model, random_transformer
from tests.parity.test_transformer import relative_error
from tests.unit.checkpoint.transformers import write_sat_folder

# fp32 sums in another order, as for the transformer itself, through adapters whose noise is as large as the
# weights
TOLERANCE = 5e-5
ATTENTION = r"[attention\.query_key_value$,attention\.dense$]"
EVERYTHING = (
    r"[query_key_value$,dense$,mlp,time_embed,patch_embed\.text_proj,adaLN_modulation,final_layer\.linear]"
)


@pytest.fixture(autouse=True)
def _one_process() -> None:
    start_single_process()


def adapted(
    preset: str, *, rank: int = 6, alpha: float = 1.0, targets: str = ATTENTION
) -> tuple[ModelSpec, DiffusionTransformer]:
    model = narrow_model(preset, lora_words(rank=rank, alpha=alpha, targets=targets))
    return model, random_transformer(model)


def base_of(dit: DiffusionTransformer, model: ModelSpec, folder: Path) -> CogVideoXTransformer3DModel:
    """diffusers' transformer with the weights under the adapters."""
    weights = {key: value for key, value in dit.state_dict().items() if not is_adapter_key(key)}
    sat = write_sat_folder(folder / "base", weights)
    out = convert(Conversion(sat, folder / "base_hf", "diffusers", model=model))
    return CogVideoXTransformer3DModel.from_pretrained(out / "transformer").eval()


def pipeline(model: ModelSpec, transformer: CogVideoXTransformer3DModel):
    """A pipeline that has nothing but its transformer."""
    kind = CogVideoXImageToVideoPipeline if "image" in model.conditions else CogVideoXPipeline
    return kind(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_load_lora_weights_gives_our_output(preset: str, targets: str, tmp_path: Path) -> None:
    model, dit = adapted(preset, targets=targets)
    theirs = base_of(dit, model, tmp_path)
    ours, without = forward_pair(dit, theirs, model)
    assert relative_error(ours, without) > 0.01, "these adapters must matter"

    sat = write_sat_folder(tmp_path / "lora", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "export", "diffusers", model=model))
    pipeline(model, theirs).load_lora_weights(out)
    ours, expected = forward_pair(dit, theirs, model)
    assert relative_error(ours, expected) < TOLERANCE


@pytest.mark.parametrize("alpha", [1.0, 6.0, 12.5])
def test_every_alpha_comes_out_at_scale_one_and_comes_back(alpha: float, tmp_path: Path) -> None:
    model, dit = adapted("cogvideox_5b", alpha=alpha)
    theirs = base_of(dit, model, tmp_path)
    sat = write_sat_folder(tmp_path / "lora", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "export", "diffusers"))
    path = out / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["transformer.r"] == said["transformer.lora_alpha"] == 6

    # a diffusers that does not read the metadata gets the same update
    from safetensors.torch import load_file

    save_file(load_file(path), tmp_path / "bare.safetensors")
    pipeline(model, theirs).load_lora_weights(tmp_path, weight_name="bare.safetensors")
    ours, expected = forward_pair(dit, theirs, model)
    assert relative_error(ours, expected) < TOLERANCE

    _, fresh = adapted("cogvideox_5b", alpha=alpha)
    add_noise_to_adapters(fresh)
    load_updates(fresh, read_lora(out))
    own, back = adapter_state_dict(dit), adapter_state_dict(fresh)
    assert back.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(back[key], value, rtol=1e-6, atol=0)  # B is scaled there and back
    assert {part.scale for parts in read_lora(out).values() for part in parts} == {alpha / 6}


def add_noise_to_adapters(dit: DiffusionTransformer) -> None:
    for key, value in adapter_state_dict(dit).items():
        if "matrix" in key:
            value.add_(torch.randn_like(value))


@pytest.mark.parametrize("preset", PRESETS)
def test_merged_equals_unmerged(preset: str, tmp_path: Path) -> None:
    model, dit = adapted(preset, targets=EVERYTHING, alpha=3.0)
    sat = write_sat_folder(tmp_path / "lora", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "merged", "diffusers", merge_lora=True, model=model))
    theirs = CogVideoXTransformer3DModel.from_pretrained(out / "transformer").eval()
    ours, expected = forward_pair(dit, theirs, model)
    assert relative_error(ours, expected) < TOLERANCE


def test_adapters_at_start_change_nothing(tmp_path: Path) -> None:
    _, dit = adapted("cogvideox_5b")
    for key, value in adapter_state_dict(dit).items():
        if ".matrix_B." in key:
            value.zero_()
    sat = write_sat_folder(tmp_path / "lora", dit.state_dict())
    merged = convert(Conversion(sat, tmp_path / "merged", "sat", merge_lora=True))
    contents = read_transformer_weights(merged)
    weights = {key: value for key, value in dit.state_dict().items() if not is_adapter_key(key)}
    assert contents.keys() == weights.keys()
    assert all(torch.equal(contents[key], value) for key, value in weights.items())


def test_an_adapter_of_another_rank_is_refused_by_name(tmp_path: Path) -> None:
    _, dit = adapted("cogvideox_5b", rank=6)
    _, other = adapted("cogvideox_5b", rank=4)
    sat = write_sat_folder(tmp_path / "lora", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "export", "diffusers"))
    with pytest.raises(
        CheckpointError, match=r"dense has an update of rank 6, and its adapter here has rank 4"
    ):
        load_updates(other, read_lora(out))


def test_there_must_be_adapters_to_merge(tmp_path: Path) -> None:
    dit = random_transformer(narrow_model("cogvideox_5b"))
    sat = write_sat_folder(tmp_path / "sat", dit.state_dict())
    with pytest.raises(CheckpointError, match="no LoRA adapters to merge"):
        convert(Conversion(sat, tmp_path / "out", "sat", merge_lora=True))
    with pytest.raises(CheckpointError, match="no LoRA adapters"):
        read_given_lora(sat)
    assert not (tmp_path / "out").exists()
