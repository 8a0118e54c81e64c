"""From prompts to files: text-to-video and image-to-video, with narrow models of random weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sat_train.cli import sample_videos
from sat_train.cli.sample_videos import sample
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError, DataError, Stopped
from sat_train.models.build import build_dit
from sat_train.models.vae.video_vae import VideoVAE

SAMPLE = Path(__file__).parents[3] / "configs" / "sample.yaml"


@pytest.fixture(autouse=True)
def _signals_of_the_tests():
    """Sampling takes over the signals of its process, which here is that of the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture
def make_run(tmp_path: Path):
    """Returns a function that makes the weights of a model, and a configuration that samples it."""

    def make(*words: str, image_to_video: bool = False) -> RunConfig:
        start_single_process()
        model = ["model.noised_image_input=true", "model.network_config.params.in_channels=32"]
        shared = [
            "args.sampling_steps=2",
            "args.sampling_num_frames=2",
            "args.sampling_image_size=[32,48]",
            "args.seed=5",
            f"args.load={tmp_path / 'dit.safetensors'}",
            f"args.output_dir={tmp_path / 'out'}",
            f"model.first_stage_config.params.ckpt_path={tmp_path / 'vae.safetensors'}",
            "model.network_config.params.num_layers=1",
            *(model if image_to_video else []),
        ]
        config = load_run_config([SAMPLE], [*shared, *words], purpose="sample", check_paths=False)
        dit = build_dit(config.spec, device="cpu", dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.normal_(std=0.05, generator=generator)
        save_file(dit.state_dict(), tmp_path / "dit.safetensors")
        coder = config.spec.coder
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = VideoVAE(
                ch=coder.ch,
                ch_mult=coder.ch_mult,
                num_res_blocks=coder.num_res_blocks,
                z_channels=coder.z_channels,
                norm_num_groups=coder.norm_num_groups,
            )
        save_file(vae.state_dict(), tmp_path / "vae.safetensors")
        return config

    return make


def _frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_prompt_file_gives_a_video_a_line_and_one_contact_sheet(make_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n\na blue ball\n")
    sample(
        make_run(f"args.input_file={tmp_path / 'prompts.txt'}", "args.input_type=txt"), start_single_process()
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-a-red-ball-seed5.mp4", "0001-a-blue-ball-seed6.mp4", "contact_sheet.png"]
    assert _frames(tmp_path / "out" / names[0]).shape == (5, 32, 48, 3)
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width >= 5 * 48
    assert sheet.height >= 2 * 32


def test_image_to_video_reads_the_image_of_each_line(make_run, tmp_path):
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("RGB", (60, 60), (colour,) * 3).save(tmp_path / f"{name}.png")
    lines = [f"a ball@@{tmp_path / 'black.png'}", f"a ball@@{tmp_path / 'white.png'}"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    config = make_run(f"args.input_file={tmp_path / 'prompts.txt'}", image_to_video=True)
    sample(config, start_single_process())
    videos = [_frames(path) for path in sorted((tmp_path / "out").glob("*.mp4"))]
    assert [video.shape for video in videos] == [(5, 32, 48, 3)] * 2


def test_a_missing_image_is_named_and_what_was_drawn_before_is_kept(make_run, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "prompts.txt").write_text(f"a@@{tmp_path / 'a.png'}\nb@@{tmp_path / 'b.png'}")
    config = make_run(f"args.input_file={tmp_path / 'prompts.txt'}", image_to_video=True)
    with pytest.raises(DataError, match=r"b\.png cannot be read as an image"):
        sample(config, start_single_process())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000-a-seed5.mp4"]


def test_weights_of_another_model_are_refused_by_name(make_run, tmp_path):
    config = make_run("args.prompt=x")
    weights = {"transformer.layers.0.attention.dense.weight": torch.zeros(3, 3)}
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"attention\.dense\.weight"):
        sample(config, start_single_process())


@pytest.mark.parametrize(("number", "count"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_leaves_the_finished_videos_and_one_line(make_run, tmp_path, monkeypatch, number, count):
    """It comes in the second of three videos: a person does not wait for its end, a scheduler does."""
    config = make_run("args.input_type=txt", f"args.input_file={tmp_path / 'prompts.txt'}")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    mesh = start_single_process()
    begun = []

    def generate(*args):
        begun.append(args[1].prompt)
        if len(begun) == 2:
            os.kill(os.getpid(), number)
        return sample_videos.generate_one(*args)

    monkeypatch.setattr(sample_videos, "generate_one", sample_videos.generate, raising=False)
    monkeypatch.setattr(sample_videos, "generate", generate)
    with pytest.raises(Stopped) as caught:
        sample(config, mesh)
    assert caught.value.exit_code == 128 + number
    assert str(caught.value) == f"stopped; {count} of 3 videos are in {tmp_path / 'out'}"
    assert len(list((tmp_path / "out").iterdir())) == count, "nothing half written"
