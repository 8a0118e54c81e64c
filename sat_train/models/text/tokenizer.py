"""T5's tokenizer, by SentencePiece itself: importing transformers' takes as long as importing torch.

A special token in a caption ("</s>" comes out of some captioning models) becomes that token, and the text
around it is encoded on its own, as by transformers.

Source: THUDM/CogVideo@7a1af71 `sat/sgm/modules/encoders/modules.py` FrozenT5Embedder, which takes the
T5Tokenizer of transformers; transformers 5 `models/t5/tokenization_t5.py` for the special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.models.text.t5_folder import check_tokenizer_files, find_t5_folders

_PIECES, _RUST = "spiece.model", "tokenizer.json"
_EXPECTED = "the tokenizer of google/t5-v1_1-xxl"
_NUM_SENTINELS = 100  # <extra_id_0> has the highest id


@dataclass(frozen=True)
class T5Tokenizer:
    """Turns captions into token ids.

    Args:
        ids_of: Ids of a text, without the end token.
        size: Number of ids that it can return.
        end_id: The token that ends a caption.
        pad_id: The token that fills a caption up.
    """

    ids_of: Callable[[str], list[int]]
    size: int
    end_id: int
    pad_id: int

    def encode(self, caption: str) -> list[int]:
        """Returns the ids of a caption with its end token, however many there are."""
        return [*self.ids_of(caption), self.end_id]

    def encode_to_length(self, caption: str, length: int) -> list[int]:
        """Returns exactly `length` ids: what is longer loses its end, but not its end token."""
        ids = [*self.ids_of(caption)[: length - 1], self.end_id]
        return ids + [self.pad_id] * (length - len(ids))


def read_tokenizer(folder: Path) -> T5Tokenizer:
    """Reads a tokenizer from its folder: spiece.model, or tokenizer.json where that is missing.

    Raises:
        CheckpointError: It is damaged, or is not T5's.
    """
    check_tokenizer_files(folder)
    name, read = (_PIECES, _read_pieces) if (folder / _PIECES).is_file() else (_RUST, _read_rust)
    with reading(folder / name, error=CheckpointError, expected=_EXPECTED):
        return read(folder / name)


def count_tokens(folder: Path, captions: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each caption, including its end token, without loading the encoder.

    Args:
        folder: As for `encoding.text_weights.read_text_encoder`.
        captions: Texts.

    Raises:
        CheckpointError: The folder has no tokenizer, or a damaged one.
    """
    tokenizer = read_tokenizer(find_t5_folders(folder)[1])
    return [len(tokenizer.encode(caption)) for caption in captions]


def _read_pieces(path: Path) -> T5Tokenizer:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    size, named = model.get_piece_size(), (model.pad_id(), model.eos_id(), model.unk_id())
    if min(named) < 0:
        raise ValueError("lacks a token for padding, the end or unknown text")
    special = {model.id_to_piece(each): each for each in named}
    special |= {f"<extra_id_{index}>": size + _NUM_SENTINELS - 1 - index for index in range(_NUM_SENTINELS)}
    split = re.compile(f"({'|'.join(map(re.escape, special))})").split

    def ids_of(text: str) -> list[int]:
        parts = ([special[part]] if part in special else model.encode(part) for part in split(text))
        return [each for part in parts for each in part]

    return T5Tokenizer(ids_of, size + _NUM_SENTINELS, end_id=model.eos_id(), pad_id=model.pad_id())


def _read_rust(path: Path) -> T5Tokenizer:
    from tokenizers import Tokenizer

    try:
        model = Tokenizer.from_file(str(path))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is not an Exception
            raise
        raise ValueError(str(error)) from error
    model.no_truncation()
    model.no_padding()
    end_id, pad_id = model.token_to_id("</s>"), model.token_to_id("<pad>")
    if end_id is None or pad_id is None:
        raise ValueError("lacks </s> or <pad>")

    def ids_of(text: str) -> list[int]:
        return list(model.encode(text, add_special_tokens=False).ids)

    return T5Tokenizer(ids_of, model.get_vocab_size(), end_id=end_id, pad_id=pad_id)
