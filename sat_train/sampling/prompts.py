"""Reads the requests of a sampling run: prompts, and first frames for image-to-video."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from sat_train.config.schema.args import IMAGE_SEPARATOR
from sat_train.errors import DataError
from sat_train.files import open_regular, read_text, reading

_SLUG_LENGTH = 60
_MOST_PROMPT_BYTES = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


@dataclass(frozen=True)
class SampleRequest:
    """One video to generate.

    Args:
        prompt: The prompt.
        image: File of the first frame; None for text-to-video.
        seed: Seed of the noise.
        name: File name without suffix.
    """

    prompt: str
    image: Path | None
    seed: int
    name: str


def build_requests(
    lines: Sequence[tuple[str, str]],
    *,
    image_to_video: bool,
    image: Path | None,
    seed: int,
) -> list[SampleRequest]:
    """Turns lines of prompts into requests, with consecutive seeds from the run's seed on.

    Args:
        lines: (source for messages, prompt or `prompt@@image`). A line's image wins over `image`.
        image_to_video: Whether the model needs an image.
        image: Image for lines that name none.
        seed: Seed of the first video.

    Raises:
        DataError: A line has no prompt, has an image that the model does not take, or lacks one.
    """
    requests = []
    for number, (where, line) in enumerate(lines):
        prompt, has_image, path = (part.strip() for part in line.partition(IMAGE_SEPARATOR))
        first_frame = Path(path).expanduser() if has_image else image
        if not prompt:
            raise DataError(f"{where} has no prompt: {line!r}", expected="prompt or prompt@@image")
        if (first_frame is not None) != image_to_video:
            problem = "names an image, but this is a text-to-video model" if first_frame else "names no image"
            raise DataError(
                f"{where} {problem}: {line!r}", expected="prompt@@image" if image_to_video else "prompt"
            )
        name = f"{number:04d}-{_slug(prompt)}-seed{seed + number}"
        requests.append(SampleRequest(prompt, first_frame, seed + number, name))
    return requests


def read_prompt_file(path: Path) -> list[tuple[str, str]]:
    """Reads a file with one prompt per line, skipping empty lines.

    Returns:
        (`path:line number`, the line).

    Raises:
        DataError: The file cannot be read as text, or holds nothing.
    """
    with reading(f"{path} cannot be read", error=DataError, expected="a text file in UTF-8"):
        text = read_text(path, limit=_MOST_PROMPT_BYTES).removeprefix("\ufeff")
    lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(where, line) for where, line in lines if line]
    if not lines:
        raise DataError(f"{path} holds no prompt", expected="one prompt per line")
    return lines


def read_image(path: Path, *, height: int, width: int) -> Tensor:
    """Reads an image, scales it until it covers the size, and crops it at the centre.

    Args:
        path: An image; rotated as its EXIF says. Formats for which Pillow starts other programs are not read.
        height: In pixels.
        width: In pixels.

    Returns:
        uint8 RGB image_chw.

    Raises:
        DataError: The file is missing or not an image.
    """
    expected = f"an image: {', '.join(_FORMATS)}"
    with (
        reading(f"{path} cannot be read as an image", error=DataError, expected=expected),
        open_regular(path) as file,
        Image.open(file, formats=_FORMATS) as picture,
    ):
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    fitted = ImageOps.fit(upright, (width, height), method=Image.Resampling.BICUBIC)
    from torchvision.transforms.functional import pil_to_tensor  # over a second, for runs with images alone

    image_chw: Tensor = pil_to_tensor(fitted)
    return image_chw


def _slug(prompt: str) -> str:
    """Returns the prompt in a form that is safe in a file name."""
    return re.sub(r"\W+", "-", prompt.lower())[:_SLUG_LENGTH].strip("-") or "video"
