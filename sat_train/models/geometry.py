"""How many frames and pixels a clip may have, and the padding in time that patches need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sat_train.errors import SatTrainError


def latent_frames(num_frames: int, *, compression: int, subject: str) -> int:
    """Returns the latent frames of a clip.

    Args:
        num_frames: Pixel frames.
        compression: Pixel frames in one latent frame after the first.
        subject: Whose frames they are, for the message.

    Raises:
        SatTrainError: The count is not a multiple of `compression`, plus 1.
    """
    if num_frames < 1 or (num_frames - 1) % compression:
        below = max((num_frames - 1) // compression, 0) * compression + 1
        raise SatTrainError(
            f"{subject}: {num_frames} frames do not fit the video autoencoder",
            expected=f"{compression} k + 1 frames",
            remedy=f"the nearest counts are {below} and {below + compression}",
        )
    return (num_frames - 1) // compression + 1


def check_size(height: int, width: int, *, multiple: tuple[int, int], subject: str) -> None:
    """Raises SatTrainError when a height or width in pixels is not a multiple of one patch's."""
    if height % multiple[0] or width % multiple[1] or min(height, width) < 1:
        raise SatTrainError(
            f"{subject}: {height}x{width} pixels do not divide into patches",
            expected=f"a height that is a multiple of {multiple[0]} and a width that is one of {multiple[1]}",
            remedy="change the size, or crop",
        )


def pixel_frames(num_latent_frames: int, *, compression: int, patch_t: int) -> int:
    """Returns the pixel frames of a sample of so many latent frames, counted as CogVideo's
    `sampling_num_frames` counts.

    There the count of a model with patches in time includes the padding: 22 latent frames of CogVideoX 1.5
    are 81 frames.

    Args:
        num_latent_frames: At least 1.
        compression: Pixel frames in one latent frame after the first.
        patch_t: Latent frames in one patch.

    Source: zai-org/CogVideo@7a1af71 `sat/configs/inference.yaml`, `sat/diffusion_video.py`
        decode_first_stage.
    """
    has_padding = patch_t > 1 and num_latent_frames > 1 and num_latent_frames % patch_t == 0
    return (num_latent_frames - has_padding - 1) * compression + 1


def padding_frames(num_latent_frames: int, patch_t: int) -> int:
    """Returns how many latent frames must be added for patches of `patch_t` frames to fill the clip."""
    return -num_latent_frames % patch_t


def counted_frames(
    num_shown: Sequence[int], *, num_latent_frames: int, compression: int, patch_t: int
) -> Tensor | None:
    """Returns which latent frames of padded clips show something of the clip, bool `[b, t]`.

    Args:
        num_shown: Pixel frames that each clip gave; the rest of a sample repeats the last of them.
        num_latent_frames: Latent frames of a sample, without those that `pad_in_time` puts in front.
        compression: Pixel frames in one latent frame after the first.
        patch_t: Latent frames in one patch.

    Returns:
        None where all of them do.
    """
    padding = padding_frames(num_latent_frames, patch_t)
    filled = torch.tensor([-(-(shown - 1) // compression) + 1 for shown in num_shown])
    counted_bt = torch.arange(padding + num_latent_frames) < padding + filled[:, None]
    return None if counted_bt.all() else counted_bt


def pad_in_time(latent_btchw: Tensor, patch_t: int) -> Tensor:
    """Repeats the first latent frame in front until patches of `patch_t` frames fill the clip.

    Source: zai-org/CogVideo@7a1af71 `finetune/models/cogvideox1_5_t2v/lora_trainer.py`; diffusers 0.42
    `CogVideoXPipeline.__call__` adds its padding, and drops it again, at the same end.
    """
    padding = padding_frames(latent_btchw.shape[1], patch_t)
    return torch.cat([latent_btchw[:, :1].expand(-1, padding, -1, -1, -1), latent_btchw], dim=1)
