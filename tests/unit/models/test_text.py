"""Laws of the text encoder, on the shipped tiny one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_train.config import load_run_config
from sat_train.config.paths import ASSETS
from sat_train.encoding.build import build_encoders
from sat_train.encoding.text_weights import read_text_encoder
from sat_train.errors import CheckpointError
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.text.tokenizer import count_tokens

TINY = ASSETS / "tiny" / "t5"
CAPTIONS = ("a red ball bounces on a green floor", "a blue ball bounces on a green floor", "")


def encoder(folder: Path = TINY, **changes) -> T5TextEncoder:
    return read_text_encoder(folder, **{"max_length": 32, **changes})


def test_embeddings_have_one_length_and_tell_captions_apart():
    text = encoder().encode(CAPTIONS)
    assert text.shape == (3, 32, 64)
    assert text.dtype == torch.float32
    distances = torch.pdist(text.flatten(1)) / text[0].norm()
    assert distances.min() > 0.1  # one other word already changes a tenth of the embedding
    assert (
        0.5 < text.std() < 2
    )  # the size of a trained T5's outputs, which the transformer's first layer expects


def test_each_caption_is_encoded_alone():
    together = encoder().encode(CAPTIONS)
    alone = torch.cat([encoder().encode([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)  # batched matrix products


def test_the_text_encoder_stays_on_the_cpu_while_encodings_go_to_the_device():
    """The meta device stands for a GPU: what comes from the CPU is there all the same."""
    words, device = ["args.text_encoder_device=cpu"], torch.device("meta")
    config = load_run_config(["configs/sft.yaml"], words, purpose="check", check_paths=False)
    encoders, threads = build_encoders(config, device), torch.get_num_threads()
    text = encoders.text(CAPTIONS[0])
    assert (text.device, text.shape) == (device, (config.spec.text.max_length, config.spec.text_width))
    assert {weight.device.type for weight in encoders.text_encoder.parameters()} == {"cpu"}
    assert encoders.text_device.type == "cpu"
    plain = load_run_config(["configs/sft.yaml"], purpose="check", check_paths=False)
    expected = build_encoders(plain, torch.device("cpu")).text(CAPTIONS[0])
    assert torch.equal(encoders.text_encoder.encode(CAPTIONS[:1])[0], expected)
    assert torch.get_num_threads() == threads, "those that it takes are given back"


def test_token_length_counts_the_end_token_and_is_what_is_cut():
    text_encoder = encoder(max_length=8)
    short, long = "a red ball", "a red ball bounces on a green floor"
    assert text_encoder.token_length("") == 1
    assert text_encoder.token_length(short) == 4
    assert text_encoder.token_length(long) > 8
    assert torch.equal(text_encoder.encode([long]), text_encoder.encode([long + " with a yellow star"]))


def test_tokens_are_counted_as_the_encoder_counts_them():
    captions = [path.read_text().strip() for path in sorted((ASSETS / "demo").glob("*/labels/*.txt"))]
    captions += [
        "",
        "  two  spaces ",
        "\u00fcml\u00e4ute, \u6f22\u5b57 & \U0001f600",
        "A" * 3000,
        "line\nbreak\ttab",
    ]
    text_encoder = encoder()
    assert count_tokens(TINY, captions) == [text_encoder.token_length(caption) for caption in captions]


def test_it_stays_frozen_in_evaluation_mode():
    text_encoder = encoder()
    text_encoder.train()
    assert not any(module.training for module in text_encoder.modules())
    assert not any(weight.requires_grad for weight in text_encoder.parameters())
    assert not text_encoder.encode(CAPTIONS).requires_grad


def test_bf16_weights_and_embeddings_throughout():
    text_encoder = encoder(max_length=16, dtype=torch.bfloat16)
    assert {weight.dtype for weight in text_encoder.parameters()} == {torch.bfloat16}
    text = text_encoder.encode(CAPTIONS)
    assert text.dtype == torch.bfloat16
    # bf16 keeps 8 bits: a few hundredths after two layers on values of order one
    torch.testing.assert_close(text.float(), encoder(max_length=16).encode(CAPTIONS), atol=0.1, rtol=0.05)


def test_fp16_is_refused():
    with pytest.raises(AssertionError, match="fp32 and bf16 only"):
        encoder(dtype=torch.float16)


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    """A diffusers model: `text_encoder/` in two shards with an index, `tokenizer/` beside it."""
    weights_folder, tokenizer_folder = tmp_path / "text_encoder", tmp_path / "tokenizer"
    for folder in (weights_folder, tokenizer_folder):
        folder.mkdir()
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, tokenizer_folder)
    shutil.copy(TINY / "config.json", weights_folder)
    weights = load_file(TINY / "model.safetensors")
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file_name, held in shards.items():
        save_file({name: weights[name] for name in held}, weights_folder / file_name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (weights_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("part", [".", "text_encoder"])
def test_diffusers_folders_are_read_like_a_t5_folder(diffusers_folder, part):
    assert torch.equal(encoder(diffusers_folder / part).encode(CAPTIONS), encoder().encode(CAPTIONS))


def test_nothing_is_downloaded():
    with pytest.raises(
        CheckpointError, match=r"google/t5-v1_1-xxl does not exist[\s\S]*nothing is downloaded"
    ):
        encoder(Path("google/t5-v1_1-xxl"))


def test_missing_weights_are_named(diffusers_folder):
    (diffusers_folder / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards"):
        encoder(diffusers_folder)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "t5")
    weights = load_file(TINY / "model.safetensors")
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(weights, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors: encoder\.block\.1.*wo\.weight"):
        encoder(tmp_path / "t5")


def test_truncated_weights_are_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "t5")
    path = tmp_path / "t5" / "model.safetensors"
    content = path.read_bytes()
    for length, message in (
        (400_000, "is damaged or not a file of weights"),
        (1000, "claims 127,360 weights, but the files next to it"),
    ):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=message):
            encoder(tmp_path / "t5")


@pytest.mark.parametrize(
    ("missing", "message"), [("config.json", "no T5 encoder"), ("spiece.model", "no T5 tokenizer")]
)
def test_incomplete_folders_say_what_is_missing(tmp_path, missing, message):
    shutil.copytree(TINY, tmp_path / "t5")
    (tmp_path / "t5" / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        encoder(tmp_path / "t5")
