"""Prompts and images of a sampling run, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sat_train.errors import DataError
from sat_train.sampling.prompts import build_requests, read_image, read_prompt_file


def _build(lines, *, image_to_video=False, image=None):
    numbered = [(f"p.txt:{number}", line) for number, line in enumerate(lines, 1)]
    return build_requests(numbered, image_to_video=image_to_video, image=image, seed=7)


def test_each_prompt_has_its_own_seed_and_name():
    requests = _build(["A red ball, bouncing!", "a/b\\..", "a/b\\.."])
    assert [request.seed for request in requests] == [7, 8, 9]
    names = [request.name for request in requests]
    assert names == ["0000-a-red-ball-bouncing-seed7", "0001-a-b-seed8", "0002-a-b-seed9"]
    assert all(request.image is None for request in requests)


def test_a_lines_image_wins_over_the_given_one():
    requests = _build(["a @@ x.png", "b"], image_to_video=True, image=Path("y.png"))
    pairs = [(request.prompt, request.image) for request in requests]
    assert pairs == [("a", Path("x.png")), ("b", Path("y.png"))]


@pytest.mark.parametrize(
    ("line", "image_to_video", "message"),
    [
        ("a", True, r"p\.txt:1 names no image: 'a'"),
        ("a@@x.png", False, r"p\.txt:1 names an image, but this is a text-to-video model"),
        ("@@x.png", True, r"p\.txt:1 has no prompt"),
    ],
)
def test_lines_that_do_not_fit_the_model_are_named(line, image_to_video, message):
    with pytest.raises(DataError, match=message):
        _build([line], image_to_video=image_to_video)


def test_prompt_files_skip_empty_lines_and_number_the_others(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Käfer\r\n\n  two  \n".encode())
    assert read_prompt_file(path) == [(f"{path}:1", "ein Käfer"), (f"{path}:3", "two")]


def test_prompt_files_without_prompts_or_text_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompt_file(path)
    path.write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompt_file(path)


def test_images_are_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    picture.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", height=50, width=50)
    assert image.shape == (3, 50, 50)
    assert image.dtype == torch.uint8
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]
    assert torch.equal(image[:, :, 3:-3], blue.expand(3, 50, 44))  # the outermost mix with the red beside


def test_rotated_and_grey_images_are_understood(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture = Image.new("L", (40, 20), 0)
    picture.paste(255, (0, 0, 20, 20))  # white on the left, so on top once turned
    picture.save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", height=40, width=20)
    assert image[:, :18].float().mean() > 250
    assert image[:, 22:].float().mean() < 5


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for name in ("a.png", "missing.png"):
        with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name, height=8, width=8)
