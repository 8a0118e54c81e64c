"""The text encoder against transformers and SentencePiece themselves, padding included."""

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, T5EncoderModel

from sat_train.config.paths import ASSETS
from sat_train.models.text.t5 import T5TextEncoder

TINY = ASSETS / "tiny" / "t5"
MAX_LENGTH = 24
CAPTIONS = [
    "a red ball bounces on a green floor, yellow background",
    "  Two   spaces,\ta tab and\na new line ",
    "zebra crossing, 42 km/h",
    "",
    "a very long caption " * 20,
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
    text_encoder = T5TextEncoder.from_folder(TINY, max_length=MAX_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    theirs = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=MAX_LENGTH).input_ids
    assert torch.equal(torch.tensor(theirs), ids)
    assert text_encoder.token_length(CAPTIONS[0]) == int((ids[0] != 0).sum())


@torch.no_grad()
def test_embeddings_with_padding_are_theirs(ids, reference):
    text = T5TextEncoder.from_folder(TINY, max_length=MAX_LENGTH).encode(CAPTIONS)
    assert torch.equal(text, reference(input_ids=ids).last_hidden_state)  # the same code on the same ids


@torch.no_grad()
def test_padding_is_attended_to(ids, reference):
    """As CogVideoX was trained: an all-ones mask changes nothing, a padding mask would."""
    text = T5TextEncoder.from_folder(TINY, max_length=MAX_LENGTH).encode(CAPTIONS)
    ones = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    masked = reference(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(text, ones, atol=1e-6, rtol=1e-6)
    assert (text - masked)[0, :8].abs().max() > 1e-2
