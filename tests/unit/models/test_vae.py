"""Laws of the video VAE that need no reference."""

import pytest
import torch
from torch import nn

from sat_train.config import Geometry
from sat_train.models.encoders import Encoders, unit_to_pixels
from sat_train.models.vae.causal import CausalConv3d, ClipState, spread_nearest
from sat_train.models.vae.tiling import Tiling, code_in_tiles
from sat_train.models.vae.video_vae import VideoVAE, chunk_lengths

# Sums of a few hundred fp32 products of order one, in another order.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


def small_vae(**changes) -> VideoVAE:
    """Four levels like the real one, random weights whose biases and norms are not the trivial ones."""
    torch.manual_seed(0)
    vae = VideoVAE(**{"ch": 4, "num_res_blocks": 1, "z_channels": 4, "norm_num_groups": 2, **changes})
    for weight in vae.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, mean=0.5, std=0.5)
    return vae.eval().requires_grad_(False)


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("frames", "chunk", "lengths"),
    [
        (49, 8, [9, 8, 8, 8, 8, 8]),
        (13, 8, [13]),
        (4, 8, [4]),
        (1, 2, [1]),
        (12, 2, [2, 2, 2, 2, 2, 2]),
        (13, 2, [3, 2, 2, 2, 2, 2]),
        (49, None, [49]),
    ],
)
def test_chunks_cover_the_clip_and_the_first_takes_the_rest(frames, chunk, lengths):
    assert chunk_lengths(frames, chunk) == lengths
    assert sum(lengths) == frames


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (9, 3), (13, 4), (17, 5), (21, 6)])
@pytest.mark.parametrize("size", [(8, 8), (17, 30)])
def test_every_4k_plus_1_comes_back_with_its_frames(frames, latent_frames, size):
    vae = small_vae()
    mean, logvar = vae.encode_moments(clips(1, frames, 3, *size))
    assert mean.shape == logvar.shape == (1, latent_frames, 4, size[0] // 8, size[1] // 8)
    assert vae.decode(mean).shape == (1, frames, 3, size[0] // 8 * 8, size[1] // 8 * 8)


@pytest.mark.parametrize("frames", [2, 4, 8, 16])
def test_frames_that_are_not_4k_plus_1_are_refused(frames):
    with pytest.raises(AssertionError, match=rf"{frames} frames: the VAE takes 4 k \+ 1"):
        small_vae().encode_moments(clips(1, frames, 3, 8, 8))


def test_clip_that_ends_at_a_chunk_border_is_the_start_of_a_longer_one():
    vae, video, latent = small_vae(), clips(1, 25, 3, 16, 16), latents(1, 7, 4, 2, 2)
    mean, logvar = vae.encode_moments(video)
    short_mean, short_logvar = vae.encode_moments(video[:, :17])
    assert torch.equal(mean[:, :5], short_mean)
    assert torch.equal(logvar[:, :5], short_logvar)
    assert torch.equal(vae.decode(latent)[:, :17], vae.decode(latent[:, :5]))


def norm_with_fixed_statistics(self: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return x * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)


def test_any_cut_equals_no_cut_once_norm_statistics_are_fixed(monkeypatch):
    """Convolutions, caches, up- and downsampling do not know where a clip is cut; only norm statistics do."""
    monkeypatch.setattr(nn.GroupNorm, "forward", norm_with_fixed_statistics)
    vae, video, latent = small_vae(), clips(1, 21, 3, 16, 8), latents(1, 6, 4, 2, 1)
    vae.encode_chunk_frames = vae.decode_chunk_frames = None
    whole_mean, _ = vae.encode_moments(video)
    whole_video = vae.decode(latent)
    for frames in (4, 8, 12):
        vae.encode_chunk_frames = frames
        torch.testing.assert_close(vae.encode_moments(video)[0], whole_mean, **CLOSE)
    for frames in (1, 2, 3, 4):
        vae.decode_chunk_frames = frames
        torch.testing.assert_close(vae.decode(latent), whole_video, **CLOSE)


def test_no_latent_sees_a_later_frame_of_another_chunk():
    vae, video = small_vae(), clips(1, 17, 3, 16, 16)
    changed = video.clone()
    changed[:, 9:] = 0.3
    mean, changed_mean = vae.encode_moments(video)[0], vae.encode_moments(changed)[0]
    assert torch.equal(mean[:, :3], changed_mean[:, :3])
    assert not torch.allclose(mean[:, 3:], changed_mean[:, 3:], atol=1e-3)


def test_calls_leave_nothing_behind_and_inputs_as_they_were():
    vae, first, other = small_vae(), clips(1, 17, 3, 16, 16), -clips(2, 9, 3, 16, 16)
    kept = first.clone()
    before = vae.encode_moments(first)[0]
    vae.decode(vae.encode_moments(other)[0])
    assert torch.equal(vae.encode_moments(first)[0], before)
    assert torch.equal(first, kept)
    assert not [
        name for module in vae.modules() for name, value in vars(module).items() if torch.is_tensor(value)
    ]


def test_clips_at_once_changes_no_value():
    video, latent = clips(3, 9, 3, 16, 16), latents(3, 3, 4, 2, 2)
    together, alone = small_vae(), small_vae(clips_at_once=1)
    torch.testing.assert_close(alone.encode_moments(video)[0], together.encode_moments(video)[0], **CLOSE)
    torch.testing.assert_close(alone.decode(latent), together.decode(latent), **CLOSE)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolution_on_stacked_frames_equals_the_3d_one(kernel_size):
    conv = CausalConv3d(3, 5, kernel_size)
    x = clips(2, 3, 6, 7, 5)
    padded = torch.cat([x[:, :, :1]] * (kernel_size - 1) + [x], dim=2)
    torch.testing.assert_close(conv(x, ClipState()), conv.conv(padded), **CLOSE)


def test_convolution_in_pieces_of_time_equals_one_piece():
    conv, x = CausalConv3d(3, 5), clips(2, 3, 11, 6, 4)
    whole = conv(x, ClipState())
    conv.max_elements = 4 * 2 * 3 * 6 * 4  # four frames
    torch.testing.assert_close(conv(x, ClipState()), whole, **CLOSE)


def test_spreading_is_nearest_interpolation():
    x = clips(1, 2, 3, 2, 4)
    assert torch.equal(
        spread_nearest(x, 2, 3, 4), nn.functional.interpolate(x, size=(6, 6, 16), mode="nearest")
    )


def test_gradients_cross_chunks():
    vae, video = small_vae().requires_grad_(True), clips(1, 17, 3, 8, 8).requires_grad_()
    vae.encode_moments(video)[0][:, -1].square().sum().backward()
    assert video.grad[:, 8].abs().sum() > 0  # last frame of the first chunk; the latent is in the second
    latent = latents(1, 5, 4, 1, 1).requires_grad_()
    vae.decode(latent)[:, -1].square().sum().backward()
    assert latent.grad[:, 2].abs().sum() > 0
    assert all(weight.grad is not None for weight in vae.parameters())


def test_bf16_gives_fp32_moments_near_the_fp32_ones():
    video = clips(1, 9, 3, 16, 16)
    mean, logvar = small_vae().encode_moments(video)
    half = small_vae().bfloat16()
    half_mean, half_logvar = half.encode_moments(video)
    assert half_mean.dtype == half_logvar.dtype == torch.float32
    assert half.decode(half_mean).dtype == torch.bfloat16
    # bf16 keeps 8 bits; some ten layers with norms in between add up to a few percent of the spread
    assert (half_mean - mean).abs().max() < 0.1 * mean.std()
    assert (half_logvar - logvar).abs().max() < 0.1 * logvar.std()


def test_log_variance_is_clamped():
    vae = small_vae()
    vae.encoder.conv_out.conv.bias[4:] = 1e4
    assert vae.encode_moments(clips(1, 1, 3, 8, 8))[1].max() == 20.0


@pytest.mark.parametrize("size", [(7, 5), (16, 9), (12, 24), (9, 9)])
def test_tiles_reassemble_the_picture(size):
    """A code that treats every pixel alone gives the same blended from tiles, for any size."""
    x = clips(1, 2, 3, *size)
    grid = (-(-size[0] // 4), -(-size[1] // 3))
    tiled = code_in_tiles(
        x,
        lambda tile: 2 * tile,
        tile_in=(6, 5),
        overlap_in=(2, 2),
        tile_out=(6, 5),
        overlap_out=(2, 2),
        grid=grid,
    )
    torch.testing.assert_close(tiled, 2 * x, atol=1e-6, rtol=1e-6)


def test_pictures_up_to_a_tile_are_not_tiled():
    tiling = Tiling(height=32, width=48, overlap_height=8, overlap_width=16)
    video = clips(1, 5, 3, 32, 48)
    assert torch.equal(
        small_vae(tiling=tiling).encode_moments(video)[0], small_vae().encode_moments(video)[0]
    )


@pytest.mark.parametrize("size", [(33, 55), (64, 48), (40, 103)])
def test_tiled_shapes_are_the_untiled_ones(size):
    tiling = Tiling(height=32, width=48, overlap_height=8, overlap_width=16)
    mean = small_vae(tiling=tiling).encode_moments(clips(1, 5, 3, *size))[0]
    assert mean.shape == (1, 2, 4, size[0] // 8, size[1] // 8)
    tiled = small_vae(tiling=tiling).decode(mean)
    assert tiled.shape == (1, 5, 3, size[0] // 8 * 8, size[1] // 8 * 8)
    assert torch.equal(small_vae().decode(mean, tiling), tiled)
    samples = Encoders(
        load_vae=lambda: small_vae(sample_tiling=tiling),
        load_text_encoder=lambda: pytest.fail("no text is encoded"),
        geometry=Geometry(patch=(1, 2, 2), temporal_compression=4, spatial_compression=8),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert torch.equal(samples.decode(mean), unit_to_pixels(tiled))
