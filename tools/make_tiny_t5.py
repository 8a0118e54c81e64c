"""Makes the tiny T5 of the embedded model: `sat_train/assets/tiny/t5/`.

    python tools/make_tiny_t5.py

The SentencePiece model is trained on the demo captions and on everyday words. The encoder has T5 v1.1's
shape in small and random weights from a fixed seed: it is not trained. A random encoder still gives
    different captions different embeddings, made of the tokens and their
places, and that is all the tiny transformer needs to tell captions apart.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel

ASSETS = Path(__file__).resolve().parents[1] / "sat_train" / "assets"
NUM_PIECES = 600
NUM_SENTINELS = 100  # T5's <extra_id_N>; transformers appends them to the pieces
SEED = 0

# What people would try on a toy model, beside the words of the demo captions.
NOUNS = """animal ball bar bear beach bird boat book bottle box boy bridge building bus cake camera car cat
chair child circle city cloud coat computer cow crowd cup dance day desert diamond disc dog door dress duck
egg elephant evening eye face family farm field fire fish flag flower food forest fox friend garden girl
glass grass ground hair hand hat heart hill home horse house ice island jacket kitchen lake lamp leaf light
lion man meadow monkey moon morning mountain mouse music night ocean panda park path people person picture
plane plant rabbit rain river road robot rock room sand scene school sea shape ship shirt shoe shore sky
smile smoke snow square star stone storm street sun sunrise sunset table tower town train tree triangle truck
video view village wall water wave wheel wind window wolf woman wood world year"""
VERBS = """bounce climb come cross cut dance drift drive eat enter fall float flow fly go grow hold jump leave
lie look melt move open paint play pour pull push rain rest ride rise roll rotate run scroll set shine shrink
sing sit slide spin stand swim take turn wait walk wave wear"""
OTHERS = """a an the and or of in on at to from with by over under between behind beside into out up down
left right around through against near far above below its his her their it he she they this that one two
three four five many some few each very slowly quickly gently together apart away toward across clockwise
counterclockwise is are was big small large tiny old young bright dark warm cold soft hard wet dry clear
cloudy sunny golden silver red green blue yellow purple orange white black grey brown pink close-up wide
slow motion background foreground camera style cartoon realistic"""


def training_words() -> list[str]:
    """The words of the demo captions, and everyday words with their forms."""
    labels = sorted((ASSETS / "demo" / "train" / "labels").glob("*.txt"))
    captions = [path.read_text(encoding="utf-8") for path in labels]
    nouns = [form for noun in NOUNS.split() for form in (noun, f"{noun}s")]
    verbs = [form for verb in VERBS.split() for form in (verb, f"{verb}s", f"{verb.rstrip('e')}ing")]
    return [*" ".join(captions).replace(",", "").split(), *nouns, *verbs, *OTHERS.split()]


def train_tokenizer(folder: Path) -> None:
    """Writes `spiece.model` with T5's special pieces: <pad> 0, </s> 1, <unk> 2."""
    model = io.BytesIO()
    # A text becomes a piece only where two different words hold it, hence the punctuation.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{word} {word}, {word}." for word in training_words()),
        model_writer=model,
        vocab_size=NUM_PIECES,
        model_type="unigram",
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=1,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": NUM_SENTINELS, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_encoder(folder: Path) -> None:
    """Writes config.json and model.safetensors; embeddings of unit variance, as in a trained T5's order of
    size.
    """
    config = T5Config(
        vocab_size=704,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    torch.manual_seed(SEED)
    encoder = T5EncoderModel(config)
    encoder.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny" / "t5")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    train_tokenizer(options.output)
    write_encoder(options.output)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"wrote {options.output}: {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
