"""Weights go out to diffusers and come back, for every family member; diffusers' own loader is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open

from sat_train.cli.convert import main
from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import read_transformer_weights
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.parity.presets import PRESETS, forward_pair, narrow_model, random_transformer
from tests.parity.test_transformer import TOLERANCE, relative_error
from tests.unit.checkpoint.transformers import write_sat_folder


@pytest.fixture(autouse=True)
def _one_process() -> None:
    start_single_process()


def check_bit_equal(folder: Path, dit: DiffusionTransformer, *, lacks: frozenset[str] = frozenset()) -> None:
    expected = {key: value for key, value in dit.state_dict().items() if key not in lacks}
    weights = read_transformer_weights(folder)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("preset", PRESETS)
def test_sat_to_diffusers_and_back_is_bit_equal(preset: str, tmp_path: Path) -> None:
    model = narrow_model(preset)
    dit = random_transformer(model)
    sat = write_sat_folder(tmp_path / "sat", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "hf", "diffusers", model=model))

    theirs, info = CogVideoXTransformer3DModel.from_pretrained(out / "transformer", output_loading_info=True)
    assert not any(info.values()), info
    ours, expected = forward_pair(dit, theirs.eval(), model)
    assert relative_error(ours, expected) < TOLERANCE
    scheduler = CogVideoXDPMScheduler.from_pretrained(out / "scheduler")
    assert scheduler.config.snr_shift_scale == (3.0 if preset == "cogvideox_2b" else 1.0)

    back = convert(Conversion(out, tmp_path / "back", "sat"))
    # diffusers computes the table that a formula gives
    check_bit_equal(back, dit, lacks=dit.derived_keys())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_unchanged(dtype: torch.dtype, tmp_path: Path) -> None:
    model = narrow_model("cogvideox_5b")
    dit = random_transformer(model).to(dtype)
    sat = write_sat_folder(tmp_path / "sat", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "hf", "diffusers", model=model))
    check_bit_equal(out, dit)


def test_resharding_between_sizes_of_the_model_axis_is_bit_equal(tmp_path: Path) -> None:
    model = narrow_model("cogvideox_5b")
    dit = random_transformer(model)
    folder = write_sat_folder(tmp_path / "1", dit.state_dict())
    for number, size in enumerate((2, 1, 2)):
        folder = convert(Conversion(folder, tmp_path / f"out{number}", "sat", model_size=size))
        assert len(list((folder / "1").glob("mp_rank_*"))) == size
        check_bit_equal(folder, dit)


def test_large_weights_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sat_train.weights import safetensors_out

    monkeypatch.setattr(safetensors_out.write_safetensors, "__kwdefaults__", {"max_shard_bytes": 500_000})
    model = narrow_model("cogvideox_5b")
    dit = random_transformer(model)
    sat = write_sat_folder(tmp_path / "sat", dit.state_dict())
    out = convert(Conversion(sat, tmp_path / "hf", "diffusers", model=model))
    shards = sorted((out / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    theirs = CogVideoXTransformer3DModel.from_pretrained(out / "transformer")
    ours, expected = forward_pair(dit, theirs.eval(), model)
    assert relative_error(ours, expected) < TOLERANCE


def test_the_command_converts_and_says_where_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = narrow_model("cogvideox_5b")
    sat = write_sat_folder(tmp_path / "sat", random_transformer(model).state_dict())
    assert main([str(sat), str(tmp_path / "out"), "--to", "sat", "--dtype", "bf16"]) == 0
    assert "every value was read back and compared" in capsys.readouterr().out
    weights = read_transformer_weights(tmp_path / "out")
    assert {lazy.dtype for lazy in weights.tensors.values()} == {torch.bfloat16}
    state = torch.load(tmp_path / "out" / "1" / "mp_rank_00_model_states.pt", weights_only=True)
    assert len(state["sat_train"]["sat_train.source_sha256"]) == 64


def test_metadata_names_the_source(tmp_path: Path) -> None:
    model = narrow_model("cogvideox_5b")
    sat = write_sat_folder(tmp_path / "sat", random_transformer(model).state_dict())
    out = convert(Conversion(sat, tmp_path / "hf", "diffusers", model=model))
    with safe_open(next((out / "transformer").glob("*.safetensors")), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["sat_train.source"] == str(sat / "1000")


def test_the_embedded_model_becomes_a_complete_pipeline(tmp_path: Path) -> None:
    """Scheduler, VAE, text encoder and tokenizer included: diffusers draws a video from the folder alone."""
    preset = "configs/model/cogvideox_tiny.yaml"
    config = load_run_config([preset], purpose="check", check_paths=False)
    out = tmp_path / "tiny"
    assert main([str(config.args.load), str(out), "--to", "diffusers", "--base", preset]) == 0
    pipeline = CogVideoXPipeline.from_pretrained(out)
    text_length, frames = config.spec.text.max_length, config.spec.trained_frames
    height, width = config.data.params.video_size
    video = pipeline(
        "a red ball",
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=2,
        max_sequence_length=text_length,
        output_type="pt",
    ).frames
    assert video.shape == (1, frames, 3, height, width)
    assert torch.isfinite(video).all()
