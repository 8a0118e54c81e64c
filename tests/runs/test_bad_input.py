"""What a person can get wrong gives one clear message, exit code 2, no traceback, and loses nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import forks
from tests.runs.launching import ROOT, Finished, run_directories
from tests.runs.ranks_apart import end_all, start_ranks

DEMO = ROOT / "sat_train" / "assets" / "demo" / "train"
DIT = ROOT / "sat_train" / "assets" / "tiny" / "dit.safetensors"


def train(tmp_path: Path, *words: str) -> Finished:
    fixed = [
        "args.train_iters=1",
        "args.num_workers=0",
        "args.eval_interval=null",
        "args.valid_video_interval=null",
    ]
    base = ["--base", str(ROOT / "configs" / "sft.yaml")]
    return forks.run("train_video.py", [*base, *fixed, f"args.save={tmp_path / 'runs'}", *words])


def check_refused(done: Finished, *shown: str) -> None:
    assert done.returncode == 2, done.output
    assert "Traceback" not in done.output, done.output
    for text in shown:
        assert text in done.output, done.output


def copy_clips(folder: Path, count: int) -> list[Path]:
    """Copies some demo clips with their captions; returns the copied videos."""
    videos = sorted((DEMO / "videos").glob("*.mp4"))[:count]
    for kind in ("videos", "labels"):
        (folder / kind).mkdir(parents=True)
    for video in videos:
        shutil.copy(video, folder / "videos")
        shutil.copy(DEMO / "labels" / f"{video.stem}.txt", folder / "labels")
    return [folder / "videos" / video.name for video in videos]


def test_an_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "clips" / "videos").mkdir(parents=True)
    check_refused(train(tmp_path, f"args.train_data=[{tmp_path / 'clips'}]"), str(tmp_path / "clips"))


def test_a_clip_without_caption(tmp_path: Path) -> None:
    video, *_ = copy_clips(tmp_path / "clips", 3)
    (tmp_path / "clips" / "labels" / f"{video.stem}.txt").unlink()
    check_refused(train(tmp_path, f"args.train_data=[{tmp_path / 'clips'}]"), video.stem)


def test_every_clip_truncated(tmp_path: Path) -> None:
    for video in copy_clips(tmp_path / "clips", 3):
        video.write_bytes(video.read_bytes()[:200])
    check_refused(train(tmp_path, f"args.train_data=[{tmp_path / 'clips'}]"), ".mp4")


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    check_refused(train(tmp_path), str(tmp_path / "runs"))


def test_a_missing_weight_file(tmp_path: Path) -> None:
    check_refused(
        train(tmp_path, f"args.load={tmp_path / 'none.safetensors'}"), "args.load", "none.safetensors"
    )


def test_weights_of_another_shape_are_listed_with_both_shapes(tmp_path: Path) -> None:
    weights = load_file(DIT)
    name = next(name for name in weights if name.endswith("time_embed.0.weight"))
    rows, columns = weights[name].shape
    weights[name] = torch.zeros(rows + 1, columns)
    save_file(weights, tmp_path / "other.safetensors")
    done = train(tmp_path, f"args.load={tmp_path / 'other.safetensors'}")
    check_refused(done, "time_embed.0.weight", str(rows + 1), str(rows))


@pytest.mark.parametrize("world_size", [1, 2])
def test_faults_of_the_configuration_are_shown_once_for_all_ranks(world_size: int, tmp_path: Path) -> None:
    """What torchrun makes of it: `test_lost_ranks.py`, `test_launch_scripts.py`."""
    words = ["args.train_itres=3", "data.params.max_num_frames=50", f"args.save={tmp_path / 'runs'}"]
    line = ["launch/train_video.py", "--base", "configs/sft.yaml", *words]
    ranks = start_ranks(lambda rank: line, world_size=world_size, logs=tmp_path)
    assert end_all(ranks, timeout_s=240) == [2] * world_size
    output = "".join((tmp_path / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(world_size))
    assert output.count("did you mean 'train_iters'") == 1, output
    assert output.count("50 is not 4k+1") == 1, output
    assert not run_directories(tmp_path / "runs")
