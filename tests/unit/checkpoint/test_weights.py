from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.interchange.locate import load_weights, read_transformer_weights
from sat_train.interchange.sources import hash_weights
from sat_train.models.dit.sharding import shard_weight
from sat_train.weights.names import check_names_and_shapes
from sat_train.weights.readers import read_metadata, read_weight_files
from tests.unit.checkpoint.transformers import (
    PREFIX,
    build_transformer,
    random_weights,
    write_diffusers_folder,
    write_sat_folder,
)

Weights = dict[str, Tensor]


def bare_pt(folder: Path, weights: Weights) -> Path:
    torch.save(weights, folder / "weights.pt")
    return folder / "weights.pt"


def legacy_pt(folder: Path, weights: Weights) -> Path:
    """The format before zip files, which cannot be mapped."""
    torch.save({"state_dict": weights}, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


def sat_file_with_everything(folder: Path, weights: Weights) -> Path:
    """One that also holds encoders, unused tables, and the random states of the run."""
    module = {PREFIX + key: value for key, value in weights.items()}
    module |= {
        "conditioner.embedders.0.transformer.shared.weight": torch.ones(2, 2),
        "first_stage_model.encoder.conv_in.conv.weight": torch.ones(2, 2),
        PREFIX + "mixins.pos_embed.freqs_sin": torch.ones(2),
        PREFIX + "transformer.position_embeddings.weight": torch.ones(2),
    }
    (folder / "sat" / "1").mkdir(parents=True)
    (folder / "sat" / "latest").write_text("1\n")
    states = {"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}
    torch.save({"module": module, **states}, folder / "sat" / "1" / "mp_rank_00_model_states.pt")
    return folder / "sat"


def safetensors_file(folder: Path, weights: Weights) -> Path:
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


FORMS: dict[str, Callable[[Path, Weights], Path]] = {
    "bare .pt": bare_pt,
    "legacy .pt": legacy_pt,
    "safetensors under SAT's keys": safetensors_file,
    "safetensors without a suffix": lambda folder, w: safetensors_file(folder, w).rename(folder / "blob"),
    "SAT folder": lambda folder, w: write_sat_folder(folder / "sat", w),
    "SAT folder of two ranks": lambda folder, w: write_sat_folder(folder / "sat", w, model_size=2),
    "SAT step folder": lambda folder, w: write_sat_folder(folder / "sat", w) / "1000",
    "SAT file": lambda folder, w: write_sat_folder(folder / "sat", w) / "1000" / "mp_rank_00_model_states.pt",
    "SAT folder with everything in it": sat_file_with_everything,
    "diffusers model folder": lambda folder, w: write_diffusers_folder(folder / "hf", w),
    "diffusers transformer folder": lambda folder, w: (
        write_diffusers_folder(folder / "hf", w) / "transformer"
    ),
    "diffusers shards": lambda folder, w: write_diffusers_folder(folder / "hf", w, shards=3),
    "diffusers index": lambda folder, w: next(
        (write_diffusers_folder(folder / "hf", w, shards=3) / "transformer").glob("*.index.json")
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(
    mesh: ProcessMesh, tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    weights = random_weights(dtype=dtype)
    contents = read_transformer_weights(FORMS[form](tmp_path, weights))
    assert contents.keys() == weights.keys()
    assert contents.shapes == {key: tuple(value.shape) for key, value in weights.items()}
    assert all(torch.equal(contents[key], weights[key]) for key in weights)

    model = build_transformer(dtype=dtype)
    load_weights(model, contents)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_safetensors_file_is_known_at_any_length_of_its_header(tmp_path: Path) -> None:
    # The length is the file's first byte: 0x80 is a pickle's too, and the metadata holds paths of any length.
    path, lengths = tmp_path / "weights.safetensors", set()
    for count in range(256):
        save_file({"a": torch.ones(2)}, path, {"origin": "x" * count})
        lengths.add(path.read_bytes()[0])
        assert read_metadata(path)["origin"] == "x" * count
        assert list(read_weight_files([path])) == ["a"]
    assert lengths == set(range(0, 256, 8))


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_of_the_model_axis_reads_its_slice(mesh: ProcessMesh, tmp_path: Path, form: str) -> None:
    weights = random_weights()
    path = FORMS[form](tmp_path, weights)
    for rank in range(2):
        contents = read_transformer_weights(path, model_rank=rank, model_size=2)
        for key, value in weights.items():
            expected = shard_weight(key, value, rank=rank, size=2)
            assert contents.shapes[key] == tuple(expected.shape)
            assert torch.equal(contents[key], expected)


def test_what_does_not_fit_is_listed_with_both_shapes_and_nothing_is_copied(mesh: ProcessMesh) -> None:
    from sat_train.weights.lazy import from_tensors

    weights = random_weights(width=64)
    weights["stray"] = weights.pop("time_embed.0.bias")
    model = build_transformer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, from_tensors(weights, where="wide.pt"))
    message = str(caught.value)
    assert "wide.pt does not fit the model" in message
    assert "missing     time_embed.0.bias [8]" in message
    assert "unexpected  stray [8]" in message
    assert (
        "mismatched  transformer.layers.0.attention.dense.weight: the model has [32, 32], the file [64, 64]"
        in message
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_weights_of_modules_alone_are_asked_for_by_name() -> None:
    base, module = "transformer.layers.0.attention.dense.weight", "mixins.control.project.weight"
    for missing, remedy in {
        (module,): "weights of control too: args.load_modules",
        (base,): "model preset",
        (base, module): "model preset",
        ("mixins.final_layer.linear.weight",): "model preset",
    }.items():
        with pytest.raises(CheckpointError, match=rf"remedy: .*{remedy}"):
            check_names_and_shapes(dict.fromkeys((*missing, "a"), (1,)), {"a": (1,)}, where="file")


def test_weights_may_lack_what_the_model_computes(mesh: ProcessMesh) -> None:
    from sat_train.weights.lazy import from_tensors

    model = build_transformer(positions="sincos")
    weights = random_weights()
    with pytest.raises(CheckpointError, match=r"missing +mixins\.pos_embed\.pos_embedding"):
        load_weights(model, from_tensors(weights, where="x"))
    load_weights(model, from_tensors(weights, where="x"), may_lack=model.derived_keys())


def test_a_patch_embedding_stored_as_a_linear_layer_is_the_same_weight(mesh: ProcessMesh) -> None:
    """CogVideo's released 1.0 weights and what its later code saves differ in this one shape."""
    from sat_train.weights.lazy import from_tensors

    weights = random_weights()
    key = "mixins.patch_embed.proj.weight"
    model = build_transformer()
    load_weights(model, from_tensors({**weights, key: weights[key].flatten(1)}, where="x"))
    assert torch.equal(model.state_dict()[key], weights[key])


def test_a_hash_names_contents_not_places(tmp_path: Path) -> None:
    weights = random_weights()
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_diffusers_folder(folder, weights, shards=2)
    assert hash_weights(one) == hash_weights(two / "transformer")
    shard = next((two / "transformer").glob("*-00002-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert hash_weights(one) != hash_weights(two)
