"""Whatever is wrong with weights is one clear error, and a conversion leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import load_weights, read_transformer_weights, read_vae_weights
from sat_train.weights.lazy import from_tensors
from tests.unit.checkpoint.transformers import (
    PREFIX,
    build_transformer,
    random_weights,
    write_diffusers_folder,
    write_sat_folder,
)

Breaker = Callable[[Path], Path]
SAT_FILE = Path("1000") / "mp_rank_00_model_states.pt"


def sat(folder: Path, **options: int) -> Path:
    return write_sat_folder(folder / "sat", random_weights(), **options)


def hf(folder: Path, shards: int = 3) -> Path:
    return write_diffusers_folder(folder / "hf", random_weights(), shards=shards)


def shard(folder: Path, number: int = 2) -> Path:
    return next((folder / "transformer").glob(f"*-{number:05d}-of-*"))


def cut_short(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def nothing_there(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def empty_file(folder: Path) -> Path:
    (folder / "weights.safetensors").touch()
    return folder / "weights.safetensors"


def truncated_pt(folder: Path) -> Path:
    path = sat(folder)
    cut_short(path / SAT_FILE, 0.6)
    return path


def truncated_safetensors(folder: Path) -> Path:
    path = hf(folder)
    cut_short(shard(path), 0.9)
    return path


def truncated_header(folder: Path) -> Path:
    path = hf(folder)
    cut_short(shard(path), 0.01)
    return path


def missing_shard(folder: Path) -> Path:
    path = hf(folder)
    shard(path).unlink()
    return path


def shards_without_index(folder: Path) -> Path:
    path = hf(folder)
    next((path / "transformer").glob("*.index.json")).unlink()
    return path


def damaged_index(folder: Path) -> Path:
    path = hf(folder)
    next((path / "transformer").glob("*.index.json")).write_text('{"weight_map": [1, 2')
    return path


def index_that_points_outside(folder: Path) -> Path:
    path = hf(folder)
    index = next((path / "transformer").glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))
    return path


def same_name_in_two_shards(folder: Path) -> Path:
    path = hf(folder)
    shard(path, 2).write_bytes(shard(path, 1).read_bytes())
    return path


def git_lfs_pointer(folder: Path) -> Path:
    path = hf(folder, shards=1)
    file = next((path / "transformer").glob("*.safetensors"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 11\n")
    return path


def web_page(folder: Path) -> Path:
    path = folder / "weights.safetensors"
    path.write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
    return path


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/sat_train_ran_code_from_a_checkpoint",)


def pickle_with_code(folder: Path) -> Path:
    torch.save({"module": {}, "payload": RunsCode()}, folder / "evil.pt")
    return folder / "evil.pt"


def legacy_pickle_with_code(folder: Path) -> Path:
    torch.save({"payload": RunsCode()}, folder / "evil.pt", _use_new_zipfile_serialization=False)
    return folder / "evil.pt"


def whole_module(folder: Path) -> Path:
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    return folder / "module.pt"


def no_state_dict(folder: Path) -> Path:
    torch.save([1, 2, 3], folder / "list.pt")
    return folder / "list.pt"


def float8(folder: Path) -> Path:
    weights = random_weights()
    weights["time_embed.0.weight"] = weights["time_embed.0.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / "fp8.safetensors")
    return folder / "fp8.safetensors"


def float8_pt(folder: Path) -> Path:
    weights = {key: value.to(torch.float8_e4m3fn) for key, value in random_weights().items()}
    return write_sat_folder(folder / "sat", weights)


def latest_points_nowhere(folder: Path) -> Path:
    path = sat(folder)
    (path / "latest").write_text("2000")
    return path


def latest_points_outside(folder: Path) -> Path:
    path = sat(folder)
    (path / "latest").write_text("../sat/1000")
    return path


def missing_model_rank(folder: Path) -> Path:
    path = sat(folder, model_size=2)
    (path / SAT_FILE).unlink()
    return path


def ranks_that_differ(folder: Path) -> Path:
    path = sat(folder, model_size=2)
    file = path / "1000" / "mp_rank_01_model_states.pt"
    state = torch.load(file, weights_only=True)
    del state["module"][PREFIX + "time_embed.0.bias"]
    torch.save(state, file)
    return path


def vae_for_a_transformer(folder: Path) -> Path:
    torch.save({"state_dict": {"encoder.down.0.block.0.conv1.conv.weight": torch.ones(2)}}, folder / "vae.pt")
    return folder / "vae.pt"


def text_encoder_for_a_transformer(folder: Path) -> Path:
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}, folder / "t5.safetensors")
    return folder / "t5.safetensors"


def another_model(folder: Path) -> Path:
    save_file({"blocks.0.attn.wq.weight": torch.ones(2, 2)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def another_diffusers_model(folder: Path) -> Path:
    save_file({"transformer_blocks.0.attn2.to_q.weight": torch.ones(2, 2)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def part_of_a_fused_weight_missing(folder: Path) -> Path:
    from sat_train.weights.diffusers_keys import transformer_to_diffusers

    tensors = {key: value.contiguous() for key, value in transformer_to_diffusers(random_weights()).items()}
    del tensors["transformer_blocks.1.attn1.to_k.weight"]
    save_file(tensors, folder / "part.safetensors")
    return folder / "part.safetensors"


def diffusers_folder_without_transformer(folder: Path) -> Path:
    path = hf(folder)
    (path / "transformer").rename(path / "elsewhere")
    return path


def several_files(folder: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(random_weights(), folder / name)
    return folder


BROKEN: list[tuple[Breaker, str]] = [
    (nothing_there, "no such file or folder"),
    (empty_folder, "holds no weights in a known format"),
    (empty_file, "is empty"),
    (truncated_pt, r"mp_rank_00_model_states\.pt is damaged"),
    (truncated_safetensors, r"00002-of-00003\.safetensors is damaged"),
    (truncated_header, r"00002-of-00003\.safetensors is damaged"),
    (missing_shard, r"lacks 1 of 3 shards: .*00002-of-00003"),
    (shards_without_index, "shards without their index"),
    (damaged_index, r"index\.json is damaged"),
    (index_that_points_outside, "names shards outside its folder"),
    (same_name_in_two_shards, "and so does another file of the same set"),
    (git_lfs_pointer, "Git LFS pointer"),
    (web_page, "damaged or not a file of weights"),
    (pickle_with_code, "would run code from it"),
    (legacy_pickle_with_code, "would run code from it"),
    (whole_module, "would run code from it"),
    (no_state_dict, "holds no state dict"),
    (float8, r"time_embed\.0\.weight is F8_E4M3"),
    (float8_pt, "is float8_e4m3fn"),
    (latest_points_nowhere, "names '2000', but there is no such folder"),
    (latest_points_outside, "but there is no such folder"),
    (missing_model_rank, r"lacks mp_rank_00_model_states\.pt"),
    (ranks_that_differ, r"ranks 0 and 1 of the model axis differ in \['time_embed\.0\.bias'\]"),
    (vae_for_a_transformer, "holds a VAE"),
    (text_encoder_for_a_transformer, "holds a T5 text encoder"),
    (another_model, r"holds other weights: blocks\.0\.attn\.wq\.weight"),
    (another_diffusers_model, r"do not belong to a CogVideoX transformer: transformer_blocks\.0\.attn2"),
    (part_of_a_fused_weight_missing, r"lacks transformer_blocks\.1\.attn1\.to_k\.weight"),
    (diffusers_folder_without_transformer, "is a diffusers model without a transformer/"),
    (several_files, "holds several files of weights: a.safetensors, b.safetensors"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_source_is_one_clear_error(
    mesh: ProcessMesh, tmp_path: Path, break_it: Breaker, message: str
) -> None:
    (tmp_path / "in").mkdir()
    path = break_it(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message):
        dict(read_transformer_weights(path))
    with pytest.raises(CheckpointError, match=message):
        convert(Conversion(path, tmp_path / "out" / "dest", "sat"))
    assert not (tmp_path / "out").exists(), "a failed conversion leaves nothing"
    assert not Path("/tmp/sat_train_ran_code_from_a_checkpoint").exists()


@pytest.mark.parametrize("family", [{"patch": (2, 2, 2), "latent_size": (4, 4, 4)}, {"in_channels": 8}])
def test_another_family_is_refused_by_names_and_shapes(mesh: ProcessMesh, family: dict[str, object]) -> None:
    weights = from_tensors(random_weights(**family), where="other_family.pt")
    message = (
        r"other_family\.pt does not fit the model(?s:.*)mixins\.patch_embed\.proj\.weight: the model has"
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(build_transformer(), weights)


def test_a_transformer_for_a_vae_is_refused(mesh: ProcessMesh, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds other weights"):
        read_vae_weights(sat(tmp_path))


def test_a_destination_that_is_taken_is_left_alone(mesh: ProcessMesh, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="dest exists already"):
        convert(Conversion(sat(tmp_path), dest, "sat"))
    assert [path.name for path in dest.iterdir()] == ["mine.txt"]


def test_a_disk_that_fills_leaves_nothing(
    mesh: ProcessMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sat_train.interchange import conversion as module

    def full(path: Path, write: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    source = sat(tmp_path)
    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        convert(Conversion(source, tmp_path / "out", "sat"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sat"]


def test_what_does_not_read_back_is_no_success(
    mesh: ProcessMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sat_train.interchange import conversion as module

    honest = module.write_file

    def one_bit_wrong(path: Path, write: Callable[..., None]) -> None:
        honest(path, write)
        if path.suffix == ".pt":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))

    source = sat(tmp_path)
    monkeypatch.setattr(module, "write_file", one_bit_wrong)
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        convert(Conversion(source, tmp_path / "out", "sat"))
    assert not (tmp_path / "out").exists()


def test_diffusers_needs_the_models_numbers(mesh: ProcessMesh, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not name its model"):
        convert(Conversion(sat(tmp_path), tmp_path / "out", "diffusers"))
    with pytest.raises(CheckpointError, match="--model-parallel-size applies to SAT's format"):
        convert(Conversion(tmp_path / "sat", tmp_path / "out", "diffusers", model_size=2))
    assert not (tmp_path / "out").exists()
