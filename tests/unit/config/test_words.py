"""The command line is read as SAT's users type it."""

from __future__ import annotations

import pytest

from sat_train.config import split_command_line
from sat_train.config.layers import Layer, merge_layers
from sat_train.config.words import COMMAND_LINE, read_words
from sat_train.errors import Fault


def read(*words: str) -> dict[str, object]:
    faults: list[Fault] = []
    trees = read_words(words, faults)
    assert not faults
    return merge_layers([Layer(COMMAND_LINE, tree, {}) for tree in trees]).tree


@pytest.mark.parametrize(
    ("argv", "base", "words"),
    [
        ("--base a.yaml b.yaml args.lr=1", ["a.yaml", "b.yaml"], ["args.lr=1"]),
        ("args.lr=1 --base a.yaml", ["a.yaml"], ["args.lr=1"]),
        ("--base a.yaml --lr 1 --base b.yaml", ["a.yaml", "b.yaml"], ["--lr", "1"]),
        ("--base=a.yaml b.yaml", ["a.yaml", "b.yaml"], []),
        ("--seed 3", [], ["--seed", "3"]),
    ],
)
def test_files_and_words_part(argv: str, base: list[str], words: list[str]) -> None:
    assert split_command_line(argv.split()) == (base, words)


@pytest.mark.parametrize(
    ("words", "args"),
    [
        (["--train-iters", "10"], {"train_iters": 10}),
        (["--train_iters", "10"], {"train_iters": 10}),
        (["--lr", "1e-3"], {"lr": 1e-3}),
        (["--lr=1e-3"], {"lr": 1e-3}),
        (["--checkpoint-activations"], {"checkpoint_activations": True}),
        (["--checkpoint-activations", "false"], {"checkpoint_activations": False}),
        (["--checkpoint-activations", "gemm"], {"checkpoint_activations": "gemm"}),
        (["--bf16", "--seed", "3"], {"bf16": True, "seed": 3}),
        (["--train-data", "a", "b", "--seed", "1"], {"train_data": ["a", "b"], "seed": 1}),
        (["--train-data", "a", "args.seed=1"], {"train_data": ["a"], "seed": 1}),
        (["--sampling-image-size", "64", "96"], {"sampling_image_size": [64, 96]}),
        (["--prompt", "a cat: it = red, {and} more"], {"prompt": "a cat: it = red, {and} more"}),
        (["--experiment-name", "2024"], {"experiment_name": "2024"}),
        (["args.train_data=[a,b]"], {"train_data": ["a", "b"]}),
        (["args.load=null"], {"load": None}),
        (["--resume", "none"], {"resume": "none"}),
        (["args.deterministic=True"], {"deterministic": True}),
    ],
)
def test_flags_and_words_become_typed_values(words: list[str], args: dict[str, object]) -> None:
    assert read(*words) == {"args": args}


def test_launchers_local_rank_is_let_through() -> None:
    assert read("--local_rank=3", "--seed", "1")["args"]["seed"] == 1
    assert read("--local-rank", "3", "--seed", "1")["args"]["seed"] == 1


def test_later_words_win() -> None:
    assert read("args.seed=1", "--seed", "2") == {"args": {"seed": 2}}


def test_deep_words() -> None:
    assert read("deepspeed.optimizer.params.betas=[0.8,0.9]") == {
        "deepspeed": {"optimizer": {"params": {"betas": [0.8, 0.9]}}}
    }
