"""Frames in time: those appended to a video, and timesteps of each frame."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.errors import SatTrainError

CLEAN = -1  # the level of a frame that is exactly clean: timestep 0 is not


class AppendedFrames(NamedTuple):
    """Latent frames behind the video in time, which attention reads and nothing predicts.

    Args:
        latent_bfchw: The frames with all channels of the network's input.
        positions: Time of each patch of frames, in patches; may repeat, and be any number.
        levels_bf: Timestep of each frame, -1 where clean.
    """

    latent_bfchw: Tensor
    positions: tuple[float, ...]
    levels_bf: Tensor


def append_frames(
    frames_bfchw: Tensor | None,
    index_f: Tensor | None,
    level_bf: Tensor | None,
    latent_btchw: Tensor,
    patch_frames: int,
) -> AppendedFrames | None:
    """Returns frames as the network appends them: channels that they lack are zero.

    Args:
        frames_bfchw: Frames of the video's height and width, with its channels or the first of them; None:
            nothing is appended.
        index_f: Their times in latent frames. A patch of several frames has the time of its first.
        level_bf: Their timesteps; None: clean.
        latent_btchw: The video's latent with all channels.
        patch_frames: Latent frames in a patch.

    Raises:
        SatTrainError: They do not fill whole patches, or do not fit next to the video.
    """
    if frames_bfchw is None:
        return None
    assert index_f is not None, "appended frames have times"
    (b, count, channels, *area), (_, _, all_channels, *own_area) = frames_bfchw.shape, latent_btchw.shape
    if count % patch_frames:
        raise SatTrainError(
            f"{count} appended latent frames do not fill patches of {patch_frames} frames",
            expected=f"a multiple of {patch_frames} from each condition that appends frames",
            remedy="Condition.latent repeats the first frame in front, as the clip's own latent has it",
        )
    if b != len(latent_btchw) or area != own_area or channels > all_channels:
        raise SatTrainError(
            f"appended frames of shape {tuple(frames_bfchw.shape)}, a latent of {tuple(latent_btchw.shape)}",
            expected="the same batch, height and width, and no more channels",
        )
    padded = F.pad(frames_bfchw.to(latent_btchw), (0, 0, 0, 0, 0, all_channels - channels))
    positions = tuple(index / patch_frames for index in index_f.tolist()[::patch_frames])
    if level_bf is None:
        level_bf = torch.full((b, count), CLEAN, device=latent_btchw.device)
    return AppendedFrames(padded, positions, level_bf)


def patch_levels(levels_bt: Tensor, patch_frames: int) -> Tensor:
    """Returns the level of each patch of frames, `[b, t]` to `[b, t / patch_frames]`.

    Raises:
        SatTrainError: The frames of a patch have several (on the CPU; on a GPU it is an assertion there).
    """
    levels = levels_bt.unflatten(1, (-1, patch_frames))
    if patch_frames > 1:
        are_equal = (levels == levels[..., :1]).all()
        if levels.device.type == "cpu" and not are_equal:
            raise SatTrainError(
                f"latent frames of one patch have several levels: {levels_bt.tolist()}",
                expected=f"one level for each {patch_frames} frames",
            )
        torch._assert_async(are_equal)
    of_patches: Tensor = levels[..., 0]
    return of_patches


def frame_timesteps(timesteps_b: Tensor, frames: int) -> Tensor:
    """Returns a timestep of each latent frame, the sample's, `[b, t]`."""
    return timesteps_b[:, None].expand(-1, frames)


def timestep_rows(
    timesteps_b: Tensor,
    levels_bt: Tensor | None,
    appended: AppendedFrames | None,
    *,
    frames: int,
    patch_frames: int,
) -> Tensor:
    """Returns the samples' timesteps, `[b]`; where frames have their own, a row of each, `[b, r]`.

    Row 0 is the sample's, those of the video's patches in time and of the appended ones follow.

    Args:
        timesteps_b: The samples' timesteps.
        levels_bt: Those of latent frames; None: the sample's.
        appended: Frames appended in time.
        frames: Patches of the video in time.
        patch_frames: Latent frames in a patch.
    """
    if levels_bt is None and appended is None:
        return timesteps_b
    own = timesteps_b[:, None]
    if levels_bt is None:
        of_video = frame_timesteps(timesteps_b, frames)
    else:
        of_video = patch_levels(levels_bt, patch_frames)
    rows = [own, of_video]
    if appended is not None:
        rows.append(patch_levels(appended.levels_bf, patch_frames))
    assert rows[1].shape[1] == frames, f"levels of {rows[1].shape[1]} patches of frames, not of {frames}"
    return torch.cat([row.to(own) for row in rows], dim=1)


def add_time_features(emb: Tensor, added: Tensor, *, frames: int, appended: int) -> Tensor:
    """Adds a module's features, `[b, e]` or of every patch of frames `[b, frames, e]`.

    Args:
        emb: Time features, `[b, e]` or the rows `[b, 1 + frames + appended, e]`.
        added: The module's; those of frames do not reach text and appended frames.
        frames: Patches of the video in time.
        appended: Appended patches in time.

    Raises:
        SatTrainError: They have another shape.
    """
    batch, width = emb.shape[0], emb.shape[-1]
    if added.shape not in ((batch, width), (batch, frames, width)):
        raise SatTrainError(
            f"time features of shape {list(added.shape)}",
            expected=f"[{batch}, {width}], or for each patch in time [{batch}, {frames}, {width}]",
            remedy="latent_frames of a condition gives values of latent frames; CogVideoX1.5 has two of them "
            "in a patch",
        )
    if added.dim() == 2:
        return emb + (added if emb.dim() == 2 else added[:, None])
    rows = emb[:, None] if emb.dim() == 2 else emb
    return rows + F.pad(added, (0, 0, 1, appended))


def concatenated(*latents: Tensor | None) -> Tensor:
    """Returns latents next to each other on channels, those that are given, like the first."""
    given = [latent for latent in latents if latent is not None]
    return given[0] if len(given) == 1 else torch.cat([each.to(given[0]) for each in given], dim=2)
