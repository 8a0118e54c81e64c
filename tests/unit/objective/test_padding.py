"""Padding in time, and which frames count."""

import pytest
import torch

from sat_train.config import Geometry
from sat_train.encoding.conditions.latent_time import pad_in_time
from sat_train.objective.padding import counted_frames


def geometry(patch_t: int) -> Geometry:
    return Geometry(patch=(patch_t, 2, 2), temporal_compression=4, spatial_compression=8)


@pytest.mark.parametrize("patch_t", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 21])
def test_padding_fills_the_last_patch_and_no_more(frames, patch_t):
    latent = torch.randn(2, frames, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    padded = pad_in_time(latent, geometry(patch_t))
    padding = geometry(patch_t).padding(frames)
    assert padded.shape[1] % patch_t == 0
    assert 0 <= padding < patch_t
    assert torch.equal(padded[:, padding:], latent)
    assert torch.equal(padded[:, :padding], latent[:, :1].expand(-1, padding, -1, -1, -1))


@pytest.mark.parametrize("patch_t", [1, 2])
def test_a_latent_frame_counts_when_any_of_its_pixel_frames_is_the_clips(patch_t):
    """Latent frame 0 is pixel frame 0, latent frame j pixel frames 4j-3 to 4j."""
    counts = tuple(range(1, 18))
    counted = counted_frames(counts, 5, geometry(patch_t))
    padding = -5 % patch_t
    for row, frames in zip(counted.tolist(), counts, strict=True):
        own = [0, *(4 * j - 3 for j in range(1, 5))]  # the first pixel frame of each
        assert row == [True] * padding + [first < frames for first in own]
    assert counted_frames((17, 17), 5, geometry(patch_t)) is None
