"""How many frames a clip may have."""

import pytest
import torch

from sat_train.errors import SatTrainError
from sat_train.models.geometry import (
    counted_frames,
    latent_frames,
    pad_in_time,
    padding_frames,
    pixel_frames,
)


def test_latent_frames_of_the_familys_clips():
    assert [latent_frames(n, compression=4, subject="clip") for n in (1, 5, 49, 81)] == [1, 2, 13, 21]


@pytest.mark.parametrize(
    ("frames", "nearest"), [(0, "1 and 5"), (4, "1 and 5"), (50, "49 and 53"), (80, "77 and 81")]
)
def test_other_counts_are_refused_with_the_nearest_ones(frames, nearest):
    with pytest.raises(
        SatTrainError, match=rf"^clip: {frames} frames do not fit[^$]*nearest counts are {nearest}"
    ):
        latent_frames(frames, compression=4, subject="clip")


@pytest.mark.parametrize(
    ("latent", "patch_t", "pixels"),
    [(13, 1, 49), (12, 1, 45), (22, 2, 81), (21, 2, 81), (42, 2, 161), (1, 2, 1)],
)
def test_latent_counts_of_old_sampling_files(latent, patch_t, pixels):
    assert pixel_frames(latent, compression=4, patch_t=patch_t) == pixels


@pytest.mark.parametrize("patch_t", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 21])
def test_padding_fills_the_last_patch_and_no_more(frames, patch_t):
    latent = torch.randn(2, frames, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    padded = pad_in_time(latent, patch_t)
    padding = padding_frames(frames, patch_t)
    assert padded.shape[1] % patch_t == 0
    assert 0 <= padding < patch_t
    assert torch.equal(padded[:, padding:], latent)
    assert torch.equal(padded[:, :padding], latent[:, :1].expand(-1, padding, -1, -1, -1))


@pytest.mark.parametrize("patch_t", [1, 2])
def test_a_latent_frame_counts_when_any_of_its_pixel_frames_is_the_clips(patch_t):
    """Latent frame 0 is pixel frame 0, latent frame j pixel frames 4j-3 to 4j."""
    shown = tuple(range(1, 18))
    counted = counted_frames(shown, num_latent_frames=5, compression=4, patch_t=patch_t)
    padding = -5 % patch_t
    for row, frames in zip(counted.tolist(), shown, strict=True):
        own = [0, *(4 * j - 3 for j in range(1, 5))]  # the first pixel frame of each
        assert row == [True] * padding + [first < frames for first in own]
    assert counted_frames((17, 17), num_latent_frames=5, compression=4, patch_t=patch_t) is None
