"""The latent frames of a sample that count in a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sat_train.config import Geometry


def counted_frames(num_shown: Sequence[int], num_latent_frames: int, geometry: Geometry) -> Tensor | None:
    """Returns a mask of the latent frames that show the clip, not its padding, bool `[b, t]`.

    Args:
        num_shown: Pixel frames from each clip; the rest of a sample repeats the last of them.
        num_latent_frames: Latent frames of a sample, without those that `pad_in_time` prepends.
        geometry: Sizes of patches and latent frames.

    Returns:
        None where all of them do.
    """
    padding = geometry.padding(num_latent_frames)
    compression = geometry.temporal_compression
    filled = [-(-(shown - 1) // compression) + 1 for shown in num_shown]
    if min(filled) >= num_latent_frames:
        return None
    return torch.arange(padding + num_latent_frames) < padding + torch.tensor(filled)[:, None]
