"""Options of commands: what is out of range, misspelt or read by nothing is refused before any work."""

from __future__ import annotations

import pytest

from sat_train.cli.main import main

SFT = ("--base", "configs/sft.yaml")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    try:
        code = main(words)
    except SystemExit as ended:  # argparse
        code = ended.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    return captured.err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "1.5x", "", "9" * 21])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("plan", "--gpus"), ("plan", "--gpu-memory"), ("plan", "--efficiency")),
        *(("check", "--ranks"), ("check", "--card")),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_range(
    capsys: pytest.CaptureFixture[str], command: str, option: str, value: str
) -> None:
    message = refusal(capsys, command, *SFT, option, value)
    assert f"argument {option}: {value}: expected a" in message
    assert "number above 0, at most " in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", *SFT, "--gpu", "8"], "--gpu: expected an option of sat-train plan; did you mean '--gpus'?"),
        (["plan", *SFT, "--hardwares", "h100"], "did you mean '--hardware'?"),
        (["check", *SFT, "--bild"], "--bild: expected an option of sat-train check; did you mean '--build'?"),
        (["cache", "prune", "--damged", "--cache-dir", "c"], "did you mean '--damaged'?"),
        (["data", "preview", *SFT, "--counts=3"], "did you mean '--count'?"),
        (["plan", *SFT, "--hardware", "H100"], "one of h100, .*; did you mean 'h100'?"),
        (["plan", *SFT, "--gpus", "3", "args.model_parallel_size=2"], "--gpus = 3: expected a multiple of"),
        (
            ["check", *SFT, "--ranks", "3", "args.model_parallel_size=2"],
            "--ranks = 3: expected a multiple of",
        ),
        (
            ["cache", "verify", "--cache-dir", "c", "args.lr=1"],
            "verify = args.lr=1: expected no configuration",
        ),
    ],
)
def test_what_no_command_reads_is_named_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    message = refusal(capsys, *words)
    for part in expected.split(".*"):
        assert part in message
