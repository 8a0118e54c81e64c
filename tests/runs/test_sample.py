"""Whole sampling commands: on one rank and two, and from the folder of a run."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tests import forks
from tests.runs.launching import run_directories
from tests.runs.ranks_apart import run_ranks

SHORT = ("args.sampling_steps=2", "args.sampling_num_frames=2")


def _videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def _frames(folder: Path) -> dict[str, np.ndarray]:
    frames = {}
    for path in folder.glob("*.mp4"):
        with av.open(str(path)) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        frames[path.name] = np.stack(decoded).astype(float)
    return frames


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_share_the_prompts_and_draw_the_same_videos(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na blue ball\na green ball\n")
    words = ["--base", "configs/sample.yaml", "--input-type", "txt", "--input-file", str(prompts), *SHORT]
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        line = [*words, "--output-dir", str(folder)]
        run_ranks("sample_video.py", line, world_size=processes, folder=tmp_path)
        assert (folder / "contact_sheet.png").is_file()
        assert len(_videos(folder)) == 3
    alone, shared = _frames(tmp_path / "1"), _frames(tmp_path / "2")
    assert alone.keys() == shared.keys()
    for name, frames in alone.items():
        # another rounding of one pixel by one level changes what H.264 decides in its whole block
        assert np.abs(frames - shared[name]).mean() < 3
    first, *others = alone.values()
    assert all(np.abs(first - other).mean() > 6 for other in others), "all videos are the same"


@pytest.mark.slow
def test_a_run_of_adapters_is_sampled_from_its_folder(tmp_path):
    train = ["--base", "configs/lora.yaml", "--train-iters", "2", "--save", str(tmp_path / "runs")]
    quiet = ["args.eval_interval=null", "args.valid_video_interval=null", "args.num_workers=0"]
    lora = "model.network_config.params.modules.lora_config.params"
    strong = [f"{lora}.r=4", f"{lora}.lora_alpha=400", "args.lr=0.1", "args.warmup=0", "args.ema_decay=0.5"]
    done = forks.run("train_video.py", [*train, *quiet, *strong])
    assert done.returncode == 0, done.output
    (folder,) = run_directories(tmp_path / "runs")
    sample = ["--base", "configs/sample.yaml", "--prompt", "a red ball", *SHORT]
    for name, words in {
        "base": [],
        "run": ["--load", str(folder)],
        "average": ["--load", str(folder), "--ema"],
    }.items():
        done = forks.run("sample_video.py", [*sample, *words, "--output-dir", str(tmp_path / name)])
        assert done.returncode == 0, done.output
    drawn = {tuple(_videos(tmp_path / name).values()) for name in ("base", "run", "average")}
    assert len(drawn) == 3, "the adapters, or their average, are not felt"
