"""Reads the requests of a sampling run: prompts, and first frames for image-to-video."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
        where: Source of the request, for messages.
        fields: What the request says of each field: a path, several, numbers or a text.
    """

    prompt: str
    image: Path | None
    seed: int
    name: str
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


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
        requests.append(SampleRequest(prompt, first_frame, seed + number, name, where))
    return requests


def read_request_rows(
    path: Path, *, fields: Sequence[str], image_to_video: bool, image: Path | None, seed: int
) -> list[SampleRequest]:
    """Reads requests from JSON lines: `{"prompt": ..., "image": ..., "seed": ..., FIELD: ...}`.

    Args:
        path: The file; paths in it start from its folder.
        fields: Names of the fields that a request may have.
        image_to_video: Whether the model needs an image.
        image: Image for rows that name none.
        seed: Seed of the first video; a row without a seed has this one plus its number.

    Raises:
        DataError: A row is no JSON object, has an unknown key, or as `build_requests`.
    """
    rows = [(where, _parse_row(where, line, fields)) for where, line in read_prompt_file(path)]
    lines = [
        (
            where,
            f"{row['prompt']}{IMAGE_SEPARATOR}{path.parent / row['image']}"
            if "image" in row
            else row["prompt"],
        )
        for where, row in rows
    ]
    requests = build_requests(lines, image_to_video=image_to_video, image=image, seed=seed)
    seeds = [row.get("seed", request.seed) for request, (_, row) in zip(requests, rows, strict=True)]
    return [
        replace(
            request,
            fields={name: row[name] for name in fields if name in row},
            seed=seed,
            name=f"{request.name.removesuffix(str(request.seed))}{seed}",
        )
        for request, seed, (_, row) in zip(requests, seeds, rows, strict=True)
    ]


def _parse_row(where: str, line: str, fields: Sequence[str]) -> dict[str, Any]:
    keys = ("prompt", "image", "seed", *fields)
    expected = f"a JSON object with {', '.join(keys)}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}", expected=expected) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{where} has no text `prompt`", expected=expected)
    if not isinstance(row.get("image", ""), str):
        raise DataError(f"{where}: `image` is no path", expected=expected)
    if type(row.get("seed", 0)) is not int or not 0 <= row.get("seed", 0) < 2**63:
        raise DataError(f"{where}: `seed` is no whole number from 0", expected=expected)
    if unknown := [key for key in row if key not in keys]:
        raise DataError(f"{where} has the unknown key `{unknown[0]}`", expected=expected)
    return row


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
