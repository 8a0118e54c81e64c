"""Malformed files and command lines, made by a rule: one message, exit code 2, never a traceback."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sat_train.cli.main import main
from sat_train.config import load_run_config
from sat_train.errors import ConfigError

_DEEP = "a: " + "[" * 100_000
_VALUES = (
    "!!int abc",
    "!!python/object/apply:os.system [x]",
    "*nowhere",
    "${",
    "${oc.env:HOME}",
    ".inf",
    "1" * 5000,
)
_VALUES += (
    '"\\0"',
    '"\\ud800"',
    "[",
    "{a: b: c}",
    "? [a]\n  : b",
    "@",
    "%",
    "`x`",
    "&a [*a]",
    "!!binary YQ==",
    "${args}",
)
_PLACES = (
    "args: {seed: %s}",
    "args:\n  load: %s",
    "model: {sampler_config: %s}",
    "data: %s",
    "args: {train_data: [%s]}",
)
FILES = [place % value for place, value in itertools.product(_PLACES, _VALUES)]
FILES += [
    f"{key}: 1" for key in ("a.b", "args.lr", '""', "? {a: 1}", "[a]", "args model", "é", "²", "!x y", "~")
]
FILES += [
    "\x00",
    "\x01",
    "\ufeff\ufeff: 1",
    "---\na: 1\n---\nb: 2",
    "\t- a",
    "a: 1\na: 2",
    "- a",
    "5",
    "'",
    '"',
    _DEEP,
]
_KEYS = (
    "args.²",
    "args..lr",
    "args.lr.",
    ".args",
    "args",
    "model",
    "data.params",
    "args.train_data.x",
    "a" * 5000,
)
WORDS = [
    f"{key}={value}" for key, value in itertools.product(_KEYS, ("5", "[", "${x", "a\0b", "\udcff", "{a: 1}"))
]
_FLAGS = (
    "--",
    "---",
    "--=",
    "--lr",
    "--no-such",
    "--²",
    "-x",
    "--lr=",
    "--seed=1.5",
    "--seed=" + "9" * 5000,
    "=",
    "==",
)
WORDS += [
    *_FLAGS,
    "configs/lora.yaml",
    "x",
    "",
    "\n",
    "args.experiment_name=../x",
    "args.experiment_name=a\nb",
]
WORDS += ["args.experiment_name=/abs", "args.experiment_name=.hidden", "args.split=²,0,0", "args.split=,,"]
WORDS += ["args.load=" + "x" * 5000, "args.resume=" + "x/" * 3000, "--prompt=\udcff", "args.load=~nobody\0"]


def test_there_are_enough_cases() -> None:
    assert len(set(FILES)) + len(set(WORDS)) >= 170


@pytest.mark.parametrize("number", range(0, len(FILES), 20))
def test_malformed_files_are_one_message(number: int, tmp_path: Path) -> None:
    for index, text in enumerate(FILES[number : number + 20]):
        path = tmp_path / f"{index}.yaml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        for purpose in ("train", "sample"):
            with pytest.raises(ConfigError) as caught:
                load_run_config(["configs/sft.yaml", path], purpose=purpose, check_paths=purpose == "train")
            assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("number", range(0, len(WORDS), 20))
def test_malformed_words_are_one_message(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    for word in WORDS[number : number + 20]:
        assert main(["check", "--base", "configs/sft.yaml", "--lr", "1", word]) == 2, word[:80]
        output = capsys.readouterr()
        assert "in the configuration:" in output.err
        assert "Traceback" not in output.err
        assert len(output.err) < 2000


def test_bytes_that_are_no_text_are_one_message(tmp_path: Path) -> None:
    for number, content in enumerate((b"\xff\xfe", b"args: {load: \x80}", bytes(range(256)))):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"expected YAML in UTF-8; byte \d+ is none"):
            load_run_config([path], check_paths=False)
