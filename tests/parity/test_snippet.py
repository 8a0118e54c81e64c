"""The Python that `sat-train convert` prints samples in diffusers what our own command samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sat_train.cli.convert import main
from sat_train.cli.diffusers_snippet import diffusers_snippet
from sat_train.cli.sample_videos import build_sampler, generate
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.interchange.conversion import Conversion, convert
from sat_train.sampling.build import build_sampling
from sat_train.sampling.prompts import SampleRequest
from tests.parity.presets import PRESETS
from tests.unit.checkpoint.test_lora_files import LORAS

ROOT = Path(__file__).resolve().parents[2]
TINY = "configs/model/cogvideox_tiny.yaml"
WORDS = ("args.prompt=a prompt", "args.sampling_steps=3", "args.seed=7")


def ours(config: RunConfig) -> np.ndarray:
    pipeline = build_sampler(config, start_single_process(), ["a prompt"])
    request = SampleRequest("a prompt", None, config.args.seed, "video")
    return (
        generate(pipeline, request, build_sampling(config), lambda step, steps: None)
        .permute(0, 2, 3, 1)
        .numpy()
    )


def theirs(snippet: str) -> np.ndarray:
    """Runs all but the last line: what writes the file is no dependency of the tests."""
    *lines, last = snippet.splitlines()
    assert last == 'export_to_video(video, "video.mp4", fps=8)'
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    return np.stack([np.asarray(frame) for frame in names["video"]])  # type: ignore[union-attr]


def check_same_video(snippet: str, config: RunConfig) -> None:
    ours_tchw, theirs_tchw = ours(config), theirs(snippet)
    assert ours_tchw.shape == theirs_tchw.shape
    assert ours_tchw.std() > 5, "a flat picture would agree with anything"
    # fp32 sums in another order may round to the level beside
    assert np.abs(ours_tchw.astype(int) - theirs_tchw.astype(int)).max() <= 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("snippet") / "tiny"
    config = load_run_config([TINY], purpose="check", check_paths=False)
    start_single_process()
    return convert(
        Conversion(Path(config.args.load), out, "diffusers", dtype=torch.float32, model=config.spec)
    )


@pytest.mark.parametrize("null_condition", ["zero", "empty_prompt"])
def test_the_snippet_of_a_model_samples_our_video(exported: Path, null_condition: str) -> None:
    words = [*WORDS, f"model.null_condition={null_condition}"]
    config = load_run_config([TINY], words, purpose="sample")
    check_same_video(diffusers_snippet(config, exported, is_lora=False), config)


def test_the_snippet_of_adapters_samples_our_video(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LORAS / "b_kohya_underscores.safetensors"
    assert main([str(lora), str(tmp_path / "lora"), "--to", "diffusers", "--base", TINY]) == 0
    assert f'pipe.load_lora_weights("{tmp_path / "lora"}", adapter_name="lora")' in capsys.readouterr().out
    config = load_run_config(
        [TINY], [*WORDS, f"args.load={exported}", f"args.load_lora={lora}"], purpose="sample"
    )
    snippet = diffusers_snippet(config, tmp_path / "lora", is_lora=True)
    check_same_video(snippet, config)
    plain = load_run_config([TINY], [*WORDS, f"args.load={exported}"], purpose="sample")
    assert np.abs(ours(config).astype(int) - ours(plain).astype(int)).max() > 1, "this adapter must matter"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_snippet_with_its_own_numbers(preset: str) -> None:
    config = load_run_config([f"configs/model/{preset}.yaml"], purpose="check", check_paths=False)
    snippet = diffusers_snippet(config, "out", is_lora=False)
    compile(snippet, preset, "exec")
    length = 224 if "1.5" in preset else 226
    assert snippet.count(f"max_sequence_length={length}") == 2
    assert ("image=load_image" in snippet) == ("ImageToVideo" in snippet) == preset.endswith("i2v")
    assert all(max(map(len, text.splitlines())) <= 110 for text in (snippet,))


def test_the_docs_show_the_snippet_that_is_printed() -> None:
    config = load_run_config(["configs/model/cogvideox_5b.yaml"], purpose="check", check_paths=False)
    docs = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert diffusers_snippet(config, "out", is_lora=False) in docs.replace("\n    ", "\n")
