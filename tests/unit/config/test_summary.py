"""A run in a dozen lines: what it comes to, and what looks unintended."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.cli.main import main
from sat_train.config import RunConfig, load_run_config
from sat_train.config.facts import ClipCounts, RunFacts
from sat_train.config.summary import summarize

MODELS = sorted(path for path in Path("configs/model").glob("*.yaml"))
FACTS = RunFacts(clips=ClipCounts(train=50, valid=3), data_ranks=4, steps=1000)


def lora(*words: str) -> RunConfig:
    files = ["configs/model/cogvideox_5b.yaml", "configs/lora.yaml"]
    return load_run_config(files, ["args.train_data=[clips]", *words], purpose="check", check_paths=False)


def notes(config: RunConfig, facts: RunFacts) -> list[str]:
    return [line for line in summarize(config, facts).splitlines() if "note:" in line]


def test_the_summary_says_what_the_numbers_come_to() -> None:
    output = summarize(lora("args.batch_size=2", "args.gradient_accumulation_steps=4"), FACTS)
    for says in (
        "text to video, 42 layers of width 3072, bf16",
        "LoRA of rank 128, alpha 1: scale 0.00781",
        "50 clips, 3 for validation: clips",
        "49 frames of 480x720 at 8 a second",
        "2 a GPU x 4 accumulated x 4 GPUs = 32 a step",
        "1,000 steps = 32,000 samples = 640.0 epochs",
        "lr 0.001",
    ):
        assert says in output
    assert len(output.splitlines()) <= 14


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["sft", "lora"])
def test_the_presets_look_as_intended(model: Path, recipe: str) -> None:
    words = ["args.train_data=[clips]"]
    config = load_run_config([model, f"configs/{recipe}.yaml"], words, purpose="check", check_paths=False)
    assert not notes(config, FACTS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("data.params.fps=16",), "trained at 8"),
        (("args.batch_size=16",), "64 samples and there are 50 clips"),
    ],
)
def test_what_looks_unintended_is_said(words: tuple[str, ...], says: str) -> None:
    (note,) = notes(lora(*words), FACTS)
    assert says in note


def test_check_ends_with_the_summary_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--base", "configs/lora.yaml"]) == 0
    output = capsys.readouterr().out
    assert output.rstrip().endswith("ready: this configuration has no fault")
    assert "54 clips, 12 for validation" in output
    assert "args.tensorboard" not in output  # a default
    assert main(["check", "--base", "configs/lora.yaml", "--all"]) == 0
    assert "args.tensorboard" in capsys.readouterr().out


def test_check_takes_the_number_of_gpus_and_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--no-paths", "--base", "configs/model/cogvideox_5b.yaml", "configs/sft.yaml"]
    assert main(["check", *files, "--ranks", "4", "--card", "24"]) == 0
    output = capsys.readouterr().out
    assert "1 accumulated x 4 GPUs = 8 a step" in output
    assert "silence=[sft_takes_enough_clips]" in output
    assert "silence=[sft_videos_fit_the_card]" in output
    with pytest.raises(SystemExit) as caught:
        main(["check", *files, "--ranks", "0"])
    assert caught.value.code == 2
    assert "--ranks: 0: expected a whole number above 0, at most 100,000" in capsys.readouterr().err


def test_check_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--base", "configs/model/cogvideox_5b.yaml", "configs/sft.yaml"]) == 0
    verdict = capsys.readouterr().out.rstrip().splitlines()[-3:]
    assert verdict[0] == "incomplete: to train it needs"
    assert verdict[1].startswith("  - args.train_data")
    assert verdict[2] == "  - args.load = {folder of CogVideoX-5b}, to be filled in"


def test_check_reads_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--base", "configs/sft.yaml", f"args.train_data=[{tmp_path}]"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
