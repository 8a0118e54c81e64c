"""`sat-train convert` writes the model that the weights are, and leaves nothing where it is ended."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sat_train.cli.convert import check_stock_inputs, main
from sat_train.cli.main import run_cli
from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError
from tests.forks import start_sat_train
from tests.runs.launching import ROOT, wait_until
from tests.unit.checkpoint.lora_runs import commit_weights
from tests.unit.checkpoint.transformers import random_weights

TINY = "configs/model/cogvideox_tiny.yaml"
WEIGHTS = ROOT / "sat_train" / "assets" / "tiny" / "dit.safetensors"


def convert_words(source: Path, dest: Path, *words: str) -> list[str]:
    return [str(source), str(dest), "--to", "diffusers", *words]


@pytest.mark.parametrize("preset", ["cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b_i2v"])
def test_weights_of_another_model_than_base_says_are_an_error_that_names_both(
    tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = convert_words(WEIGHTS, tmp_path / "out", "--base", f"configs/model/{preset}.yaml")
    assert run_cli(lambda: main(words)) == 2
    message = capsys.readouterr().err
    assert str(WEIGHTS) in message
    assert "the model has [" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"), [("", "describes no model"), ("args: {}\n", "describes no model")]
)
def test_a_run_whose_configuration_is_empty_gets_no_toy_config(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    commit_weights(start_single_process(), run, 1, random_weights())
    (run / "resolved.yaml").write_text(text)
    assert run_cli(lambda: main(convert_words(run, tmp_path / "out"))) == 2
    assert message in capsys.readouterr().err
    assert run_cli(lambda: main(convert_words(run, tmp_path / "out", "--base", TINY))) == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_diffusers_folder_s_own_config_is_compared_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(convert_words(WEIGHTS, tmp_path / "out", "--base", TINY)) == 0
    path = tmp_path / "out" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_text_seq_length": 226}))
    capsys.readouterr()
    assert run_cli(lambda: main(convert_words(tmp_path / "out", tmp_path / "again", "--base", TINY))) == 2
    assert "max_text_seq_length: 226 there, 32 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x" * 5000, "out"], "x" * 100),
        (["{weights}", "x" * 5000], "x" * 100),
        (["~nobody-of-this-name/w.pt", "out"], "nobody-of-this-name"),
        (["{weights}", "{folder}/out", "--lora-strength", "0.5"], "--lora-strength is given without --lora"),
        (
            ["{weights}", "{folder}/out", "--lora", "{folder}/gone.safetensors"],
            "gone.safetensors: no such file",
        ),
        (["{weights}", "{folder}/out", "--lora", "{weights}"], "holds no LoRA adapters"),
        (["{weights}", "{folder}/out", "--merge-lora"], "holds no LoRA adapters to merge"),
        (["{folder}", "{folder}/out"], "holds no weights in a known format"),
    ],
)
@pytest.mark.parametrize("to", ["sat", "diffusers"])
def test_what_cannot_be_converted_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, to: str
) -> None:
    given = [word.format(weights=WEIGHTS, folder=tmp_path) for word in words]
    assert run_cli(lambda: main([*given, "--to", to, "--base", TINY])) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_base_is_compared_with_the_weights_for_sat_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(WEIGHTS), str(tmp_path / "out"), "--to", "sat", "--base", "configs/model/cogvideox_5b.yaml"]
    assert run_cli(lambda: main(words)) == 2
    assert "does not fit the model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def large_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that takes seconds to convert."""
    keys = [f"model.diffusion_model.transformer.layers.{i}.attention.dense.weight" for i in range(24)]
    path = tmp_path_factory.mktemp("large") / "in.pt"
    torch.save({"module": {key: torch.ones(12, 1_000_000) for key in keys}}, path)
    yield path
    path.unlink()  # a gigabyte


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_ended_conversion_says_one_line_and_leaves_nothing(
    tmp_path: Path, large_weights: Path, number: int
) -> None:
    log = tmp_path / "log.txt"
    words = ["convert", str(large_weights), str(tmp_path / "out"), "--to", "sat"]
    process = start_sat_train(words, cwd=ROOT, log=log)
    wait_until(lambda: list(tmp_path.glob(".tmp-convert-*/1/*")) or process.poll() is not None, poll_s=0.001)
    assert process.poll() is None, "it ended before it wrote"
    process.send_signal(number)
    assert process.wait(timeout=240) == 128 + number
    name = signal.Signals(number).name
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if not line.startswith("writing ")]
    assert lines == [f"ended by {name}: {tmp_path}/out was not written, and nothing is left behind"]
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_channels_of_conditions_are_refused_and_frames_in_the_slot_are_not(caplog):
    words = ["data.fields.control.kind=video", "model.conditions.control.target=ControlVideo"]
    wide = load_run_config(["configs/sft.yaml"], words, check_paths=False)
    with pytest.raises(CheckpointError, match="the conditions control append channels to the latent"):
        check_stock_inputs(wide)
    base = ["configs/model/cogvideox_tiny_i2v.yaml", "configs/sft.yaml"]
    frames = ["args.train_data=[clips]", "model.noised_image_dropout=0"]
    frames += ["model.conditions.frames.target=FramesInSlot"]
    with caplog.at_level("WARNING", logger="sat_train"):
        check_stock_inputs(load_run_config(base, frames, check_paths=False))
    assert "know nothing of the conditions frames" in caplog.text
