"""The text encoder against transformers and SentencePiece themselves, padding included."""

import shutil

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from sat_train.config.paths import ASSETS
from sat_train.encoding.text_weights import read_text_encoder
from sat_train.models.text.t5_encoder import T5Encoder, T5Settings
from sat_train.models.text.tokenizer import read_tokenizer

TINY = ASSETS / "tiny" / "t5"
MAX_LENGTH = 24
CAPTIONS = [
    "a red ball bounces on a green floor, yellow background",
    "  Two   spaces,\ta tab and\na new line ",
    "zebra crossing, 42 km/h",
    "",
    "a very long caption " * 20,
]
# text that holds special tokens, as some captioning models write it
SPECIAL = [
    "a red ball</s>",
    "</s> </s>",
    "a</s>red",
    "<pad>x <unk> y",
    "a <extra_id_3>  b<extra_id_100>",
    "</S>",
]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Token ids by SentencePiece alone: pieces, end token 1, padding 0."""
    pieces = sentencepiece.SentencePieceProcessor(str(TINY / "spiece.model"))
    rows = [[*pieces.encode(caption)[: MAX_LENGTH - 1], 1] for caption in CAPTIONS]
    return torch.tensor([row + [0] * (MAX_LENGTH - len(row)) for row in rows])


@pytest.fixture(scope="module")
def reference() -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(TINY).eval()


def test_tokens_are_sentencepiece_s(ids):
    text_encoder = read_text_encoder(TINY, max_length=MAX_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    theirs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=MAX_LENGTH).input_ids
    assert torch.equal(torch.tensor(theirs), ids)
    assert text_encoder.token_length(CAPTIONS[0]) == int((ids[0] != 0).sum())


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_either_file_gives_transformers_s_tokens(tmp_path, file):
    theirs = AutoTokenizer.from_pretrained(TINY)
    theirs.save_pretrained(tmp_path)  # writes tokenizer.json alone
    assert not (tmp_path / "spiece.model").exists()
    if file == "spiece.model":
        shutil.copy(TINY / file, tmp_path)
    ours = read_tokenizer(tmp_path)
    captions = CAPTIONS + SPECIAL
    assert [ours.encode(caption) for caption in captions] == theirs(captions).input_ids
    padded = theirs(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH).input_ids
    assert [ours.encode_to_length(caption, MAX_LENGTH) for caption in captions] == padded
    assert ours.size == len(theirs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_with_padding_are_theirs_bit_for_bit(ids, dtype):
    text = read_text_encoder(TINY, max_length=MAX_LENGTH, dtype=dtype).encode(CAPTIONS)
    reference = T5EncoderModel.from_pretrained(TINY, dtype=dtype).eval()
    assert torch.equal(text, reference(input_ids=ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relu", "gated-silu"])
@pytest.mark.parametrize("tokens", [5, 300])
def test_other_activations_and_far_tokens_are_theirs(kind, tokens):
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    theirs = T5EncoderModel(T5Config(**sizes, feed_forward_proj=kind)).eval()
    ours = T5Encoder(T5Settings(**sizes, feed_forward_proj=kind))
    ours.load_state_dict({name: theirs.state_dict()[name] for name in ours.state_dict()})
    ids_bl = torch.randint(30, (2, tokens))
    assert torch.equal(ours(ids_bl), theirs(input_ids=ids_bl).last_hidden_state)


@torch.no_grad()
def test_padding_is_attended_to(ids, reference):
    """As CogVideoX was trained: an all-ones mask changes nothing, a padding mask would."""
    text = read_text_encoder(TINY, max_length=MAX_LENGTH).encode(CAPTIONS)
    ones = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    masked = reference(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(text, ones, atol=1e-6, rtol=1e-6)
    assert (text - masked)[0, :8].abs().max() > 1e-2
