"""Hostile weights: of the transformer, of adapters, of the autoencoder and the text encoder, and images."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.hostile.case import Case, Field
from tests.hostile.words import LORA, SAMPLE, T5, TRAIN, VAE
from tests.unit.checkpoint import hostile
from tests.unit.checkpoint.hostile import NAME, Evil
from tests.unit.checkpoint.test_hostile_weights import (
    IMAGES,
    LORA_HEADERS,
    T5_CONFIGS,
    adapter_elsewhere,
    fifo_tokenizer,
    index_outside,
    random_tokenizer,
    t5,
    tokenizer_of_brackets,
)
from tests.unit.data.sources.test_hostile import sparse

_LAYER = "transformer.transformer_blocks.0.attn1.to_q"
_COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "train": lambda path: [*TRAIN, f"args.load={path}"],
    "sample": lambda path: [*SAMPLE, "args.prompt=x", f"args.load={path}"],
    "convert": lambda path: ["convert", path, "out", "--to", "sat"],
    "adapters": lambda path: [*LORA, f"args.load_lora={path}"],
    "autoencoder": lambda path: [*TRAIN, f"{VAE}={path}"],
    "diffusers": lambda path: ["convert", path, "out", "--to", "diffusers"],
    "merging": lambda path: ["convert", "asset:tiny/dit.safetensors", "out", "--to", "sat", "--lora", path],
}


def cases() -> Iterator[Case]:
    """Gives all hostile weights; each format meets each command in turn."""
    commands = list(_COMMANDS)
    for number, (name, make) in enumerate(hostile.CASES.items()):
        yield _weights(name, make, commands[number % len(commands)])
    yield from _code_cases()
    yield from _path_cases()
    yield from _adapter_cases()
    yield from _text_encoder_cases()
    yield from _image_cases()


def _weights(name: str, prepare: hostile.Maker, command: str) -> Case:
    def make(field: Field) -> list[str]:
        return _COMMANDS[command](str(prepare(field.inside)))

    return Case(f"weights: {name}, {command}", make)


def _payload(field: Field) -> dict[str, object]:
    return {NAME: torch.ones(4), "x": Evil(os.mkdir, str(field.executed))}


def _zip(path: Path, field: Field) -> None:
    torch.save(_payload(field), path)


def _legacy(path: Path, field: Field) -> None:
    torch.save(_payload(field), path, _use_new_zipfile_serialization=False)


def _plain(path: Path, field: Field) -> None:
    path.write_bytes(pickle.dumps(_payload(field)))


def _numpy(path: Path, field: Field) -> None:
    torch.save({NAME: np.array([Evil(os.mkdir, str(field.executed))], dtype=object)}, path)


def _name_of_a_module(path: Path, field: Field) -> None:
    """Its class is allowed, its state is not."""
    torch.save({NAME: torch.nn.Parameter(torch.ones(2)), "y": [Evil(os.mkdir, str(field.executed))]}, path)


_PAYLOADS = {"zip": _zip, "legacy": _legacy, "plain": _plain, "numpy": _numpy, "parameter": _name_of_a_module}


def _code_cases() -> Iterator[Case]:
    for name, write in _PAYLOADS.items():
        for suffix in ("pt", "safetensors", "bin"):
            for command in ("train", "sample", "convert", "adapters", "autoencoder"):
                if suffix != "pt" and command != "train":
                    continue

                def make(
                    field: Field, write: object = write, suffix: str = suffix, command: str = command
                ) -> list[str]:
                    write(field.inside / f"w.{suffix}", field)  # type: ignore[operator]
                    return _COMMANDS[command](f"w.{suffix}")

                yield Case(f"weights: code in a {name} .{suffix}, {command}", make)
    yield Case("weights: code in a PEFT folder, adapters", _peft_code)
    yield Case("weights: code in a SAT folder, train", _sat_code)
    yield Case("weights: code in a diffusers folder, sample", _diffusers_code)


def _peft_code(field: Field) -> list[str]:
    folder = field.inside / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "auto_mapping": {"x": "os"}}')
    _zip(folder / "adapter_model.bin", field)
    return _COMMANDS["adapters"]("peft")


def _sat_code(field: Field) -> list[str]:
    (field.inside / "sat" / "1").mkdir(parents=True)
    (field.inside / "sat" / "latest").write_text("1")
    _zip(field.inside / "sat" / "1" / "mp_rank_00_model_states.pt", field)
    return _COMMANDS["train"]("sat")


def _diffusers_code(field: Field) -> list[str]:
    folder = field.inside / "model" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "os.system", "auto_map": {"a": "evil--code.Model"}}')
    _zip(folder / "diffusion_pytorch_model.bin", field)
    return _COMMANDS["sample"]("model")


def _link(name: str, to: str) -> Callable[[Field], str]:
    def make(field: Field) -> str:
        (field.inside / name).symlink_to(to.format(secret=field.secret))
        return name

    return make


def _loop(field: Field) -> str:
    (field.inside / "a.safetensors").symlink_to("b.safetensors")
    (field.inside / "b.safetensors").symlink_to("a.safetensors")
    return "a.safetensors"


def _folder_of_itself(field: Field) -> str:
    (field.inside / "model").mkdir()
    (field.inside / "model" / "transformer").symlink_to("..")
    return "model"


def _sparse(field: Field) -> str:
    with open(field.inside / "w.safetensors", "wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(20_000_000_000)
    return "w.safetensors"


def _sparse_pickle(field: Field) -> str:
    with open(field.inside / "w.pt", "wb") as file:
        file.write(b"\x80\x02")
        file.truncate(20_000_000_000)
    return "w.pt"


def _zip_bomb(field: Field) -> str:
    with zipfile.ZipFile(field.inside / "w.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        for number in range(4):
            archive.writestr(f"archive/data/{number}", bytes(300_000_000))
    return "w.pt"


def _storage_beyond_file(field: Field) -> str:
    torch.save({NAME: torch.ones(2, 2)}, field.inside / "good.pt")
    with zipfile.ZipFile(field.inside / "good.pt") as good:
        members = {info.filename: good.read(info) for info in good.infolist()}
    with zipfile.ZipFile(field.inside / "w.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:1] if name.endswith("data/0") else content)
    (field.inside / "good.pt").unlink()
    return "w.pt"


_PATHS: dict[str, Callable[[Field], str]] = {
    "link to a device": _link("w.pt", "/dev/zero"),
    "link to random numbers": _link("w.safetensors", "/dev/urandom"),
    "link to memory": _link("w.pt", "/proc/self/mem"),
    "link to the secret": _link("w.safetensors", "{secret}"),
    "two links in a circle": _loop,
    "a folder inside itself": _folder_of_itself,
    "a sparse file": _sparse,
    "a sparse pickle": _sparse_pickle,
    "a zip of zeros": _zip_bomb,
    "a storage beyond its file": _storage_beyond_file,
    "a device itself": lambda field: "/dev/zero",
    "an endless device": lambda field: "/dev/full",
    "a web address": lambda field: f"http://127.0.0.1:{field.port}/w.safetensors",
    "a web address of a bucket": lambda field: "s3://bucket/w.safetensors",
    "a name of a hub": lambda field: "THUDM/CogVideoX-2b",
    "an asset outside": lambda field: "asset:../../../etc/passwd",
    "escapes in the path": lambda field: "\x1b]0;owned\x07.safetensors",
}


def _path_cases() -> Iterator[Case]:
    for name, prepare in _PATHS.items():
        for command in ("train", "convert", "adapters"):

            def make(field: Field, prepare: object = prepare, command: str = command) -> list[str]:
                return _COMMANDS[command](prepare(field))  # type: ignore[operator]

            yield Case(f"weights: {name}, {command}", make)


def _adapter_cases() -> Iterator[Case]:
    tensors = {f"{_LAYER}.lora_A.weight": torch.ones(2, 8), f"{_LAYER}.lora_B.weight": torch.ones(8, 2)}
    for number, text in enumerate(LORA_HEADERS):

        def in_header(field: Field, text: str = text) -> list[str]:
            save_file(tensors, field.inside / "a.safetensors", metadata={"lora_adapter_metadata": text})
            return _COMMANDS["adapters"]("a.safetensors")

        def beside(field: Field, text: str = text) -> list[str]:
            (field.inside / "peft").mkdir()
            save_file(tensors, field.inside / "peft" / "adapter_model.safetensors")
            (field.inside / "peft" / "adapter_config.json").write_text(text)
            return _COMMANDS["merging"]("peft")

        yield Case(f"weights: header {number} of adapters", in_header)
        yield Case(f"weights: configuration {number} of adapters", beside)


_ENCODERS: dict[str, Callable[[Path], None]] = {
    change.__name__: change
    for change in (
        index_outside,
        adapter_elsewhere,
        fifo_tokenizer,
        random_tokenizer,
        tokenizer_of_brackets,
    )
}
_EVIL_ENCODER = {
    "attn_implementation": "evil/kernels",
    "_attn_implementation": "evil/kernels",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "auto_map": {"AutoModel": "evil--code.Model"},
    "_name_or_path": "evil/t5",
}


def _text_encoder_cases() -> Iterator[Case]:
    for number, config in enumerate(T5_CONFIGS):

        def sized(field: Field, config: dict[str, object] = config) -> list[str]:
            t5(field.inside / "t5", **config)
            return [*SAMPLE, "args.prompt=x", f"{T5}=t5"]

        yield Case(f"weights: text encoder of odd sizes {number}", sized)
    for name, change in _ENCODERS.items():

        def changed(field: Field, change: Callable[[Path], None] = change) -> list[str]:
            change(t5(field.inside / "t5"))
            return [*SAMPLE, "args.prompt=x", f"{T5}=t5"]

        yield Case(f"weights: text encoder, {name}", changed)

    for key, value in _EVIL_ENCODER.items():

        def named(field: Field, key: str = key, value: object = value) -> list[str]:
            t5(field.inside / "t5", **{key: value})
            return [*SAMPLE, "args.prompt=x", f"{T5}=t5"]

        yield Case(f"weights: text encoder whose {key} counts for nothing", named, codes=(0,))
    for payload in ("zip", "legacy", "plain"):

        def code(field: Field, payload: str = payload) -> list[str]:
            folder = t5(field.inside / "t5")
            (folder / "model.safetensors").unlink()
            _PAYLOADS[payload](folder / "pytorch_model.bin", field)
            return [*TRAIN, f"{T5}=t5"]

        yield Case(f"weights: code in a {payload} .bin of a text encoder", code)


_IMAGE_TO_VIDEO = ["model.noised_image_input=true", "model.network_config.params.in_channels=32"]
_PROMPT_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": lambda path: sparse(path),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 99),
    "a NUL in an image's name": lambda path: path.write_text("x@@a\0b.png\n"),
    "an image of 5000 letters": lambda path: path.write_text(f"x@@{'a' * 5000}.png\n"),
    "an image at an address": lambda path: path.write_text("x@@http://127.0.0.1:9/a.png\n"),
}


def _image_cases() -> Iterator[Case]:
    for name, prepare in IMAGES.items():

        def shown(field: Field, prepare: Callable[[Path], object] = prepare) -> list[str]:
            prepare(field.inside / "pic.png")
            return [*SAMPLE, "args.prompt=x", "args.image=pic.png", *_IMAGE_TO_VIDEO]

        yield Case(f"weights: image {name}", shown)
    for name, prepare in _PROMPT_FILES.items():

        def listed(field: Field, prepare: Callable[[Path], object] = prepare) -> list[str]:
            prepare(field.inside / "prompts.txt")
            return [*SAMPLE, "args.input_type=txt", "args.input_file=prompts.txt", *_IMAGE_TO_VIDEO]

        yield Case(f"weights: prompt file, {name}", listed)

    def upwards(field: Field) -> list[str]:
        Image.new("RGB", (96, 64)).save(field.inside / "a.png")
        (field.inside / "prompts.txt").write_text("../../outside/victim.txt $(touch x) \x1b[2J\n")
        return [*SAMPLE, "args.input_type=txt", "args.input_file=prompts.txt"]

    yield Case("weights: a prompt that looks like a path and clears the screen", upwards, codes=(0,))
