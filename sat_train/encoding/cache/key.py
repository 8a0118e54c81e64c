"""Keys: a hash of all inputs of an encoding, so that any difference gives another key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sat_train.json_record import JsonRecord

# Raise it when the same file and settings give other pixels, latents or embeddings than before.
CODE_VERSION = 1
FIELDS_VERSION = 1  # the same for values of fields
PIXELS_VERSION = 2  # the same for pixels alone: embeddings of captions stay valid


def digest(**facts: Any) -> str:
    """Returns the SHA-256, in hex, of named facts: JSON values, floats to the last bit."""
    text = json.dumps({"version": CODE_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class EncoderDigests:
    """Identity of the encoders, each as one hash over weights, settings and dtype.

    Args:
        vae: Of the video autoencoder.
        text: Of the text encoder.
        files: By path, of the files of weights that conditions name.
    """

    vae: str
    text: str
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin(JsonRecord):
    """The source file of an encoding, in its state at that time.

    Args:
        path: Absolute.
        size: Bytes.
        mtime_ns: Time of its last change; of a remote file, a number that changes with it.
        identity: Its identity in the key.
        part: First byte and number of bytes of the part that was used; None: all of it.
    """

    path: str
    size: int
    mtime_ns: int
    identity: str
    part: tuple[int, int] | None = None


def clip_key(
    *,
    identity: str,
    start: float,
    count: int,
    total: int,
    fps: float,
    size: tuple[int, int],
    max_upscale: float,
    vae: str,
) -> str:
    """Returns the key of a clip's moments.

    Args:
        identity: Of the file's contents.
        start: Start of the window, in seconds of the file's clock.
        count: Frames read.
        total: Frames of the sample: more than read where the last one is repeated.
        fps: Frames a second of the sample.
        size: Height and width in pixels.
        max_upscale: Largest factor by which a picture may be enlarged.
        vae: Digest of the autoencoder.
    """
    return digest(
        kind="clip",
        pixels=PIXELS_VERSION,
        identity=identity,
        window=[start, count, total, fps],
        size=list(size),
        max_upscale=max_upscale,
        crop=["center"],
        vae=vae,
    )


def field_key(**facts: Any) -> str:
    """Returns the key of the value of one field of a sample.

    Args:
        **facts: All its inputs: settings, files or the value itself and, as far as it depends on them, the
            clip's identity, window and picture.
    """
    return digest(kind="field", fields=FIELDS_VERSION, **facts)


def image_key(*, pixels: str, noise: Sequence[float] | None, vae: str) -> str:
    """Returns the key of the moments of an image condition.

    Args:
        pixels: Key of the clip whose first frame it is, or of the image file.
        noise: Seed and number of the view whose noise is added to it, and its level if that is not the
            released one; None: no noise.
        vae: Digest of the autoencoder.
    """
    return digest(kind="image", pixels=pixels, noise=noise and list(noise), vae=vae)


def text_key(caption: str, *, text: str) -> str:
    """Returns the key of a caption's embedding by the text encoder of this digest."""
    return digest(kind="text", caption=caption, text=text)
