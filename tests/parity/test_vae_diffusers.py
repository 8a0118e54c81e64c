"""The video VAE against diffusers' AutoencoderKLCogVideoX: same weights, same numbers."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from sat_train.errors import CheckpointError
from sat_train.models.vae.tiling import Tiling
from sat_train.models.vae.video_vae import VideoVAE
from sat_train.weights.diffusers_vae_keys import (
    is_diffusers_vae,
    vae_state_from_diffusers,
    vae_state_to_diffusers,
)

# fp32 sums in another order (2D kernels for 3D convolutions, pointwise ones before enlarging) through some
# twenty layers; outputs are of order one.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILING = Tiling(height=32, width=48, overlap_height=8, overlap_width=16)


def reference(**changes) -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4, **changes
    )
    for weight in vae.parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=0.5, std=0.5)
    return vae.eval().requires_grad_(False)


def ours(theirs: AutoencoderKLCogVideoX, **changes) -> VideoVAE:
    vae = VideoVAE(ch=8, ch_mult=(1, 2, 2, 4), num_res_blocks=1, norm_num_groups=4, **changes)
    vae.load_state_dict(vae_state_from_diffusers(theirs.state_dict()))
    return vae.eval().requires_grad_(False)


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(theirs: AutoencoderKLCogVideoX, video_btchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    posterior = theirs.encode(video_btchw.transpose(1, 2)).latent_dist
    return posterior.mean.transpose(1, 2), posterior.logvar.transpose(1, 2)


@pytest.mark.parametrize("size", [(16, 24), (17, 23)])
@pytest.mark.parametrize("frames", [1, 5, 9, 17, 49])
def test_moments_and_frames(frames, size):
    theirs = reference()
    vae, video = ours(theirs), clips(2 if frames < 17 else 1, frames, 3, *size)
    mean, logvar = vae.encode_moments(video)
    their_mean, their_logvar = moments(theirs, video)
    torch.testing.assert_close(mean, their_mean, **CLOSE)
    torch.testing.assert_close(logvar, their_logvar, **CLOSE)
    if frames == 5:
        return  # two latent frames: they return 8 frames, which is no clip of theirs (see video_vae.py)
    their_video = theirs.decode(mean.transpose(1, 2)).sample.transpose(1, 2)
    torch.testing.assert_close(vae.decode(mean), their_video, **CLOSE)


def test_whole_clip_encoding_equals_theirs_without_chunks():
    theirs = reference()
    theirs.num_sample_frames_batch_size = 49
    video = clips(1, 25, 3, 16, 16)
    mean, _ = ours(theirs, encode_chunk_frames=None).encode_moments(video)
    torch.testing.assert_close(mean, moments(theirs, video)[0], **CLOSE)
    chunked, _ = ours(theirs).encode_moments(video)
    assert (
        mean - chunked
    ).abs().max() > 1e-3  # the norms' statistics do differ: it is a choice, not a detail


@pytest.mark.parametrize("size", [(40, 72), (64, 91)])
def test_tiles_equal_those_of_diffusers(size):
    theirs = reference()
    theirs.enable_tiling(TILING.height, TILING.width, 1 / 4, 1 / 3)
    vae, video = ours(theirs, tiling=TILING), clips(1, 9, 3, *size)
    mean, _ = vae.encode_moments(video)
    torch.testing.assert_close(mean, moments(theirs, video)[0], **CLOSE)
    their_video = theirs.decode(mean.transpose(1, 2)).sample.transpose(1, 2)
    torch.testing.assert_close(vae.decode(mean), their_video, **CLOSE)


def test_full_size_has_their_names_and_shapes():
    with torch.device("meta"):
        theirs, vae = AutoencoderKLCogVideoX().state_dict(), VideoVAE().state_dict()
    renamed = vae_state_to_diffusers(vae)
    assert {name: weight.shape for name, weight in renamed.items()} == {
        name: weight.shape for name, weight in theirs.items()
    }
    assert len(vae) == 436  # as in SAT's 3d-vae.pt, without its discriminator


def test_names_there_and_back():
    theirs = reference().state_dict()
    sat = vae_state_from_diffusers(theirs)
    assert is_diffusers_vae(theirs)
    assert not is_diffusers_vae(sat)
    back = vae_state_to_diffusers({**sat, "loss.discriminator.weight": torch.zeros(1)})
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rename", [vae_state_to_diffusers, vae_state_from_diffusers])
def test_strange_names_are_refused(rename):
    with pytest.raises(CheckpointError, match=r"1 weights do not belong to a CogVideoX VAE: transformer\.x"):
        rename({"transformer.x": torch.zeros(1)})
