"""The pages typed by somebody new: "Your first LoRA" from clips to diffusers, and the README's real model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from tests.forks import run_line, shell_words, start_sat_train
from tests.runs.launching import BIN, ROOT, Finished, Started, environment, wait_until
from tests.unit.data.videos import make_folder

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_LORA = (ROOT / "docs" / "first_lora.md").read_text(encoding="utf-8")
PROMPT = "a big grey rabbit crawls out of its burrow onto a green meadow"
# What makes the pages' runs short; everything else is typed as it stands there.
SHORT = {
    "train": "args.train_iters=120 args.eval_interval=120 args.save_interval=120 "
    "args.valid_video_interval=null",
    "sample": "args.sampling_steps=8",
    "check": "--no-paths",  # the released weights are not here
}


def lines_of(page: str) -> list[str]:
    """Returns the lines of a page's shell blocks, continued lines joined, comments left out."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL))
    return [
        line.partition("  #")[0].rstrip() for line in blocks.replace("\\\n", " ").splitlines() if line.strip()
    ]


def write_settings(page: str, folder: Path) -> None:
    """Writes the page's YAML blocks under the names that it gives them."""
    names = re.findall(r"`(my_\w+\.yaml)`:\n\n```yaml", page)
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(names) == len(blocks) == 2
    for name, block in zip(names, blocks, strict=True):
        (folder / name).write_text(block, encoding="utf-8")


def shortened(line: str) -> str:
    return f"{line} {SHORT.get(shlex.split(line)[1], '')}"


def done(line: str, folder: Path) -> str:
    """Types a line, and returns what it prints; it must succeed."""
    finished = run_line(shortened(line), cwd=folder)
    assert finished.returncode == 0, finished.output
    return finished.output


def interrupted(process: Started, log: Path, *, after: str) -> Finished:
    """Types Ctrl-C once the command has printed something: a terminal sends it to the whole group."""
    wait_until(lambda: after in log.read_text() or process.poll() is not None, timeout_s=300)
    assert process.poll() is None, log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    return Finished(process.wait(timeout=240), log.read_text())


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.slow
def test_your_first_lora_goes_from_clips_to_a_model_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("configs", "sat_train"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_settings(FIRST_LORA, tmp_path)
    lines = iter(lines_of(FIRST_LORA))
    for _ in ("mkdir", "cp", "cp", "inspect", "preview", "precompute"):
        done(next(lines), tmp_path)
    assert (tmp_path / "data_report" / "index.html").is_file()
    assert (tmp_path / "data_report" / "contact_sheet.png").is_file()

    words, log = shell_words(shortened(next(lines)), cwd=tmp_path), tmp_path / "log.txt"
    process = start_sat_train(words[1:], cwd=tmp_path, log=log)
    stopped = interrupted(process, log, after="step 20/120")
    assert "Traceback" not in stopped.output
    (saved,) = re.findall(r"saved step (\d+); resume with args\.resume=auto", stopped.output)
    assert 20 <= int(saved) < 120
    assert f"training steps {int(saved) + 1} to 120" in done(next(lines), tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 1

    for _ in ("before", "after"):
        done(next(lines), tmp_path)
    (base,) = (tmp_path / "before").glob("*.mp4")
    (ours,) = (tmp_path / "after").glob("*.mp4")
    frames = frames_of(ours).astype(float)
    assert np.abs(frames - frames_of(base)).mean() > 6  # of 255: the LoRA is seen
    done(next(lines), tmp_path)
    assert (tmp_path / "my_lora" / "pytorch_lora_weights.safetensors").is_file()
    printed = done(next(lines), tmp_path)
    monkeypatch.chdir(tmp_path)
    theirs = sampled_with_diffusers(printed)
    assert frames.shape == theirs.shape
    assert np.abs(frames - theirs).mean() < 4  # of 255: what H.264 loses

    # The settings for 5B are whole, but for the weights; its runs need a GPU.
    assert "42 layers of width 3072" in done(next(lines), tmp_path)
    assert [shlex.split(line)[0] for line in lines] == ["sat-train", "sat-train", "torchrun"]


def sampled_with_diffusers(printed: str) -> np.ndarray:
    """Runs the script that `convert` has printed, with the prompt and the steps of the sample.

    In this process, which has imported diffusers already.
    """
    script = printed[printed.index("import torch\n") :]
    script = script[: script.index("export_to_video(video")]
    script = script.replace('"a prompt"', f'"{PROMPT}"')
    script = re.sub(r"num_inference_steps=\d+", "num_inference_steps=8", script)
    script = script.replace(", export_to_video", "").replace(
        "from diffusers.utils import export_to_video", ""
    )
    names: dict[str, Any] = {}
    exec(script, names)
    return np.stack([np.asarray(frame) for frame in names["video"]])


def make_narrow_weights(folder: Path) -> None:
    """Writes random weights of a narrow CogVideoX in diffusers' layout."""
    torch.manual_seed(0)
    CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        time_embed_dim=32,
        text_embed_dim=64,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=17,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    ).save_pretrained(folder / "transformer")
    AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=4, latent_channels=16
    ).save_pretrained(folder / "vae")
    tiny_t5 = ROOT / "sat_train" / "assets" / "tiny" / "t5"
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_t5 / name, folder / "text_encoder")
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(tiny_t5 / name, folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")


def narrow_copy_of(preset: Path, target: Path) -> None:
    """Writes a model file of the same text with smaller numbers."""
    tree = yaml.safe_load(preset.read_text())
    network = tree["model"]["network_config"]["params"]
    network.update(num_layers=2, hidden_size=128, num_attention_heads=2, time_embed_dim=32)
    network.update(num_frames=17, latent_height=8, latent_width=12)
    network["modules"]["patch_embed_config"]["params"]["text_hidden_size"] = 64
    tree["data"]["params"].update(video_size=[64, 96], max_num_frames=17)
    coder = {"ch": 8, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "z_channels": 16, "norm_num_groups": 4}
    for part in ("encoder_config", "decoder_config"):
        tree["model"]["first_stage_config"]["params"][part]["params"] = coder
    target.write_text(yaml.safe_dump(tree))


@pytest.mark.slow
def test_the_command_for_a_real_model_trains_on_one_folder_of_weights(tmp_path: Path) -> None:
    """The README's words, unchanged but for the paths; the model file is the same at a narrow width.

    A shell starts them, with Python and all imports.
    """
    make_narrow_weights(tmp_path / "weights")
    make_folder(tmp_path / "clips", "abcdef", num_frames=90, height=64, width=96)
    narrow_copy_of(ROOT / "configs/model/cogvideox_5b.yaml", tmp_path / "model.yaml")
    (line,) = [line for line in lines_of(README) if line.startswith("sat-train train") and "5b" in line]
    for old, new in {
        "configs/model/cogvideox_5b.yaml": "model.yaml",
        "/weights/CogVideoX-5b": str(tmp_path / "weights"),
        "/data/clips": str(tmp_path / "clips"),
    }.items():
        assert old in line
        line = line.replace(old, new)
    log = tmp_path / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {BIN}/{line}"],
            cwd=tmp_path,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stopped = interrupted(process, log, after="step 1/1000")
    assert "Traceback" not in stopped.output
    assert re.search(r"saved step \d+; resume with args\.resume=auto", stopped.output), stopped.output
    assert stopped.returncode == 130
    assert "5 clips, 1 for validation" in stopped.output
