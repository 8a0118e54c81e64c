"""Scales pictures of any size until they cover the training size, and crops them."""

from __future__ import annotations

from dataclasses import dataclass

from sat_train.data.clips.bad_clip import BadClip

MAX_SCALED_PIXELS = 1 << 26  # the limit of a picture, which a very long one could exceed once enlarged


@dataclass(frozen=True)
class CoverCrop:
    """Scaling and cropping of one clip, the same for all of its frames.

    Args:
        scaled_height: Size after scaling, at least the target's.
        scaled_width: Likewise.
        top: First row of the crop.
        left: First column of the crop.
        height: Target size.
        width: Likewise.
        source: Height and width of the picture as shown, before scaling.
    """

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int
    source: tuple[int, int]


def cover_crop(
    *,
    source: tuple[int, int],
    target: tuple[int, int],
    max_upscale: float,
) -> CoverCrop:
    """Finds the scale at which a picture just covers the target, and the crop of its middle.

    Args:
        source: Height and width of the picture as shown.
        target: Height and width of the result.
        max_upscale: Largest factor by which a picture may be enlarged.

    Raises:
        BadClip: The picture would have to be enlarged more than `max_upscale`.

    Source: `resize_for_rectangle_crop` in sat/data_video.py, zai-org/CogVideo@7a1af71 (which rounds down).
    """
    scale = max(target[0] / source[0], target[1] / source[1])
    if scale > max_upscale:
        raise BadClip(
            "too small",
            f"{source[0]}x{source[1]} (height x width) must be enlarged {scale:.2f} times to cover "
            f"{target[0]}x{target[1]}, but data.params.max_upscale allows {max_upscale:g}",
        )
    height = max(target[0], round(source[0] * scale))
    width = max(target[1], round(source[1] * scale))
    if height * width > MAX_SCALED_PIXELS:
        raise BadClip("too large", f"scaled until it covers {target[0]}x{target[1]} it is {height}x{width}")
    return CoverCrop(height, width, (height - target[0]) // 2, (width - target[1]) // 2, *target, source)
