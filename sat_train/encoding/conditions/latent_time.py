"""The time axis of latents: pixel frames as latent frames, and padding in front up to whole patches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sat_train.config import Geometry

How = Literal["mean", "last", "stack"]


def pad_in_time(latent_btchw: Tensor, geometry: Geometry) -> Tensor:
    """Prepends copies of the first latent frame until the length divides into patches.

    Source: zai-org/CogVideo@7a1af71 `finetune/models/cogvideox1_5_t2v/lora_trainer.py`; diffusers 0.42
    `CogVideoXPipeline.__call__` adds its padding, and drops it again, at the same end.
    """
    padding = geometry.padding(latent_btchw.shape[1])
    return torch.cat([latent_btchw[:, :1].expand(-1, padding, *latent_btchw.shape[2:]), latent_btchw], dim=1)


def to_latent_frames(x_t: Tensor, how: How, geometry: Geometry) -> Tensor:
    """Turns values of pixel frames into values of latent frames, padded in front as the clip's latent is.

    The first latent frame shows the first pixel frame alone, each further one a group of
    `temporal_compression` frames.

    Args:
        x_t: Values of each pixel frame, `[t, ...]`, a valid number of frames; floating for `mean`.
        how: `mean` of a group, its `last` frame, or all of it as a `stack`; the first frame is repeated.
        geometry: Sizes of patches and latent frames.

    Returns:
        `[latent frames, ...]`; of a stack `[latent frames, temporal_compression, ...]`.
    """
    geometry.check_frames(len(x_t), subject="values of frames")
    groups = torch.cat([x_t[:1].expand(geometry.temporal_compression, *x_t.shape[1:]), x_t[1:]])
    stacked = groups.unflatten(0, (-1, geometry.temporal_compression))
    frames = {"mean": lambda: stacked.mean(dim=1), "last": lambda: stacked[:, -1], "stack": lambda: stacked}
    return pad_in_time(frames[how]()[None], geometry)[0]
