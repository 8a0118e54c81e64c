"""First frames of image-to-video validation: named beside the prompts or in them, the same pictures."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from sat_train.config import load_run_config
from sat_train.sampling.build import build_sampling
from sat_train.training.callbacks.videos_to_sample import given_conditions

CONFIGS = Path(__file__).parents[3] / "configs"
I2V = [CONFIGS / "sft.yaml", CONFIGS / "recipe" / "image_to_video.yaml"]
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in COLORS.items():
        Image.new("RGB", (300, 200), color).save(tmp_path / f"{name}.png")
    return tmp_path


def _conditions(words: list[str]) -> tuple[list[str], list[torch.Tensor]]:
    config = load_run_config([str(path) for path in I2V], words, purpose="train")
    return given_conditions(config, build_sampling(config))


@pytest.mark.parametrize("named_in_prompts", [True, False])
def test_each_prompt_starts_from_its_image_cropped_to_the_size_of_the_videos(folder, named_in_prompts):
    red, blue = folder / "red.png", folder / "blue.png"
    words = [f"args.valid_prompts=[one@@{red},two@@{blue}]"]
    if not named_in_prompts:
        words = ["args.valid_prompts=[one,two]", f"args.valid_images=[{red},{blue}]"]
    prompts, images = _conditions(words)
    assert prompts == ["one", "two"]
    size = build_sampling(load_run_config([str(path) for path in I2V], words, purpose="train"))
    for image, color in zip(images, COLORS.values(), strict=True):
        assert image.shape == (3, size.height, size.width)
        assert image.flatten(1).float().mean(1).tolist() == list(color)


def test_without_images_none_are_given_and_the_clips_take_their_place():
    prompts, images = _conditions(["args.valid_prompts=[one,two]"])
    assert (prompts, images) == (["one", "two"], [])
