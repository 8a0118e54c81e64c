"""A stranger's weights: one error that names the file, whatever is in it; no code, no memory, no waiting."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sat_train.config import load_run_config
from sat_train.config.paths import ASSETS
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.text_weights import read_text_encoder
from sat_train.errors import CheckpointError, DataError
from sat_train.interchange.adapters import read_lora
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import read_transformer_weights, read_vae_weights
from sat_train.sampling.prompts import read_image, read_prompt_file
from tests.unit.checkpoint.hostile import CASES, Evil, damaged_copies, marker

# torch's about the strange things in these files
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

T5 = ASSETS / "tiny" / "t5"
MOST_MEMORY = 500_000_000  # the largest file has 50 kB


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_one_error(read, path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        dict(read(path))
    message = str(raised.value).replace("\\x00", "\0")
    assert path.name[:50] in message or f"/{path.parent.name} " in message, (
        "the file, or the folder that lacks one"
    )


def test_every_hostile_file_is_one_error_that_names_it(mesh: ProcessMesh, tmp_path: Path) -> None:
    before = peak_memory()
    assert len(CASES) >= 100
    for number, (name, make) in enumerate(CASES.items()):
        for part, read in enumerate((read_transformer_weights, read_vae_weights, read_lora)):
            folder = tmp_path / f"{number}-{part}"
            folder.mkdir()
            path = make(folder)
            try:
                check_one_error(read, path)
            except BaseException as error:
                raise AssertionError(f"{name} by {read.__name__}") from error
            assert not marker(folder).exists(), name
    assert peak_memory() - before < MOST_MEMORY


def test_random_damage_is_read_as_what_is_there_or_one_error(mesh: ProcessMesh, tmp_path: Path) -> None:
    errors = []
    for name, content in damaged_copies(tmp_path, count=60):
        (tmp_path / name).write_bytes(content)
        for read in (read_transformer_weights, read_lora):
            try:
                dict(read(tmp_path / name))
            except CheckpointError as error:
                errors.append((name, str(error)))
    assert all(name in message for name, message in errors)
    assert len(errors) > 60


LORA_HEADERS = [
    "[" * 100_000,
    "[1]",
    "7",
    "null",
    '{"transformer.lora_alpha": "many"}',
    '{"transformer.lora_alpha": 1e999}',
    '{"transformer.lora_alpha": [1]}',
    '{"transformer.alpha_pattern": [1]}',
    '{"transformer.alpha_pattern": {"(a+)+$": 1}}',
    '{"transformer.lora_alpha": ' + "9" * 5000 + "}",
    '{"transformer.lora_alpha": 1' + "0" * 400 + "}",
    '{"transformer.peft_type": "LOHA"}',
]


@pytest.mark.parametrize("text", LORA_HEADERS, ids=lambda text: text[:40])
def test_a_hostile_header_of_a_lora_is_one_error(tmp_path: Path, text: str) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_lora(tmp_path / "a.safetensors")
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="adapter_"):
        read_lora(tmp_path / "peft")


def test_a_lora_header_with_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    for scale in ("x", "NaN", "-1", "0", "Infinity", "[1]", "{}", '{"transformer.layers.0": 1}', "9" * 5000):
        save_file(tensors, tmp_path / "a.safetensors", metadata={"sat_train.lora_scale": scale})
        with pytest.raises(
            CheckpointError, match=r"(?s)a\.safetensors: .*a positive number, or one for each"
        ):
            read_lora(tmp_path / "a.safetensors")


def t5(folder: Path, **config: object) -> Path:
    shutil.copytree(T5, folder)
    settings = json.loads((T5 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


T5_CONFIGS: list[dict[str, object]] = [
    {"num_layers": 10**9},
    {"num_layers": -1},
    {"num_layers": 0},
    {"num_layers": True},
    {"num_layers": "2"},
    {"num_layers": 250},
    {"d_model": 10**12},
    {"d_model": 2.5},
    {"d_ff": 900_000},
    {"vocab_size": 10**15},
    {"num_heads": None, "d_kv": [1]},
    {"feed_forward_proj": "gated-evil"},
    {"feed_forward_proj": 7},
    {"layer_norm_epsilon": "x"},
    {"layer_norm_epsilon": 1e999},
    {"model_type": "bert"},
]


@pytest.mark.parametrize("config", T5_CONFIGS, ids=str)
def test_a_t5_of_sizes_that_are_not_there_is_one_error(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"t5"):
        read_text_encoder(t5(tmp_path / "t5", **config), max_length=8)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "{", "\x00", '{"d_model": ' + "9" * 5000 + "}"])
def test_a_t5_config_that_is_no_configuration_is_one_error(tmp_path: Path, text: str) -> None:
    folder = t5(tmp_path / "t5")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"t5/config\.json"):
        read_text_encoder(folder, max_length=8)


def test_a_t5_names_no_kernel_no_quantisation_and_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *words, **more: asked.append(words)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    folder = t5(
        tmp_path / "t5",
        attn_implementation="evil/kernels",
        _attn_implementation="evil/kernels",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        auto_map={"AutoModel": "evil--code.Model"},
        _name_or_path="evil/t5",
    )
    plain = read_text_encoder(T5, max_length=8).encode(["a ball"])
    assert torch.equal(read_text_encoder(folder, max_length=8).encode(["a ball"]), plain)
    assert not asked


def code_in_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(
        {"shared.weight": torch.ones(200_000), "x": Evil(os.mkdir, str(marker(folder)))},
        folder / "pytorch_model.bin",
    )


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')


def adapter_elsewhere(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/t5"}')


def fifo_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")


def random_tokenizer(folder: Path) -> None:
    (folder / "spiece.model").write_bytes(bytes(range(256)) * 40)


def tokenizer_of_brackets(folder: Path) -> None:
    (folder / "spiece.model").unlink()  # next to it the other file is not read
    (folder / "tokenizer.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "change",
    [code_in_bin, index_outside, adapter_elsewhere, fifo_tokenizer, random_tokenizer, tokenizer_of_brackets],
)
def test_a_hostile_t5_folder_is_one_error(tmp_path: Path, change) -> None:
    folder = t5(tmp_path / "t5")
    change(folder)
    with pytest.raises(CheckpointError, match="t5"):
        read_text_encoder(folder, max_length=8)
    assert not marker(folder).exists()


def test_an_export_holds_known_files_of_t5_only_and_follows_no_link_out(
    mesh: ProcessMesh, tmp_path: Path
) -> None:
    folder = t5(tmp_path / "t5", auto_map={"AutoModel": "evil--code.Model"})
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.json").write_text("{}")
    (folder / "run.bin").write_bytes(b"x")
    preset = "configs/model/cogvideox_tiny.yaml"
    words = [f"model.conditioner_config.params.emb_models.0.params.model_dir={folder}"]
    config = load_run_config([preset], words, purpose="check", check_paths=False)
    conversion = Conversion(Path(config.args.load), tmp_path / "out", "diffusers", model=config.spec)
    out = convert(conversion)
    assert {path.name for path in (out / "text_encoder").iterdir()} == {"config.json", "model.safetensors"}
    assert "evil" not in (out / "text_encoder" / "config.json").read_text()
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    out = convert(Conversion(conversion.source, tmp_path / "again", "diffusers", model=config.spec))
    assert not (out / "tokenizer").exists(), "a link that leads outside is said, and nothing is copied"


def write_eps(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def write_bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


IMAGES = {
    "eps": write_eps,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no picture"),
    "ppm": lambda path: path.write_bytes(b"P6\n-1 -1\n255\n"),
    "png header": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)),
    "gif": lambda path: path.write_bytes(b"GIF89a\xff\xff\xff\xff" + bytes(8)),
    "tiff": lambda path: path.write_bytes(b"II*\0\xff\xff\xff\xff" + bytes(20)),
    "bomb": write_bomb,
    "fifo": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_one_error_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {marker(tmp_path)}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    IMAGES[name](tmp_path / "pic.png")
    with pytest.raises(DataError, match=r"pic\.png cannot be read as an image"):
        read_image(tmp_path / "pic.png", height=8, width=8)
    assert not marker(tmp_path).exists()


def test_a_prompt_file_that_never_ends_is_one_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=r"prompts\.txt cannot be read"):
        read_prompt_file(tmp_path / "prompts.txt")
