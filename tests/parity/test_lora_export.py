"""Adapters as diffusers loads them, at scale 1.0, give what our own model gives; so do merged ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sat_train.config import ModelSpec
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError
from sat_train.interchange.adapters import is_adapter_key, read_given_lora, read_lora
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import read_transformer_weights
from sat_train.models.adapter import adapter_state_dict, start_adapters
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


KINDS = {
    "patterns": ("Lora", ("use_rslora=true", "rank_pattern={dense: 3}", "alpha_pattern={mlp: 4}")),
    "dora": ("Dora", ("rank_pattern={dense: 3}",)),
    "pissa": ("Pissa", ("rank_pattern={dense: 3}",)),
}
PARAMS = "model.network_config.params.modules.lora_config.params"


@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_is_read_back_by_diffusers_by_peft_and_by_us(kind: str, tmp_path: Path) -> None:
    target, settings = KINDS[kind]
    words = lora_words(rank=6, alpha=3.0, targets=EVERYTHING, kind=target)
    model = narrow_model("cogvideox_5b", (*words, *(f"{PARAMS}.{word}" for word in settings)))
    dit = random_transformer(model)
    if kind == "pissa":
        start_adapters(dit, start_single_process(), seed=0)
    theirs = base_of(dit, model, tmp_path)
    ours, without = forward_pair(dit, theirs, model)
    assert relative_error(ours, without) > 0.01, "these adapters must matter"
    by_peft = copy.deepcopy(theirs)

    sat = write_sat_folder(tmp_path / "lora", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "export", "diffusers", model=model))
    pipeline(model, theirs).load_lora_weights(out)
    ours, expected = forward_pair(dit, theirs, model)
    assert relative_error(ours, expected) < TOLERANCE

    path = out / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        settings_in_file = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    peft_config = LoraConfig(
        **{key.removeprefix("transformer."): each for key, each in settings_in_file.items()}
    )
    inject_adapter_in_model(peft_config, by_peft)
    assert not set_peft_model_state_dict(by_peft, tensors).unexpected_keys
    ours, expected = forward_pair(dit, by_peft.eval(), model)
    assert relative_error(ours, expected) < TOLERANCE

    with pytest.raises(CheckpointError, match=r"which SAT does not know(?s:.*)--merge-lora"):
        convert(Conversion(sat, tmp_path / "unmerged", "sat"))
    if kind == "dora":
        with pytest.raises(CheckpointError, match=r"says use_dora(?s:.*)name the run or its step"):
            read_lora(out)
        return
    back, own = read_lora(out), read_lora(sat)
    assert back.keys() == own.keys()
    for layer, parts in own.items():
        for part, other in zip(back[layer], parts, strict=True):
            assert (part.rank, part.scale) == (other.rank, pytest.approx(other.scale, rel=1e-6))
            torch.testing.assert_close(part.delta(), other.delta(), rtol=1e-5, atol=1e-5)


def test_several_adapters_become_one_file_of_their_exact_sum(tmp_path: Path) -> None:
    folders = {}
    for name, rank in {"first": 6, "second": 4}.items():
        _, dit = adapted("cogvideox_5b", rank=rank, alpha=2.0)
        add_noise_to_adapters(dit)
        folders[name] = write_sat_folder(tmp_path / name, dit.state_dict())
    first, second = (read_lora(folder) for folder in folders.values())

    def one_file(name: str, **settings: object) -> Path:
        lora = (folders["second"], folders["first"])
        conversion = Conversion(folders["first"], tmp_path / name, "diffusers", lora=lora, **settings)
        return convert(conversion)

    exact = read_lora(one_file("exact", strength=0.5, lora_strength=(-1.5, 0.25)))
    for layer, (part, *_) in exact.items():
        expected = 0.75 * first[layer][0].delta(torch.float64) - 1.5 * second[layer][0].delta(torch.float64)
        torch.testing.assert_close(part.delta(torch.float64), expected, rtol=1e-5, atol=1e-6)
        assert part.rank == 16
    low = read_lora(one_file("low", lora_rank=5))
    assert {part.rank for parts in low.values() for part in parts} == {5}
    for settings, says in [
        ({"lora_strength": (1.0, 2.0, 3.0)}, "--lora-strength has 3 numbers for 2 files"),
        ({"lora_rank": 5, "merge_lora": True}, "--lora-rank applies to adapters"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            one_file("refused", **settings)
