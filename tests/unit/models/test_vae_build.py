"""Configuration to video VAE."""

import logging
from dataclasses import replace

import pytest
import torch

from sat_train.config import ModelSpec, load_run_config
from sat_train.errors import ConfigError
from sat_train.models.vae.build import build_vae, warn_of_slow_conv3d
from sat_train.models.vae.tiling import Tiling

VAE = "model.first_stage_config.params"


def spec(coder: dict | None = None, **settings) -> ModelSpec:
    tiny = {"ch": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 4, "norm_num_groups": 4}
    full = load_run_config(["configs/model/cogvideox_5b.yaml"], purpose="check", check_paths=False).spec
    numbers = full.coder.model_copy(update=coder or tiny)
    return replace(full, coder=numbers, vae=full.vae.model_copy(update=settings))


def test_settings_reach_the_vae():
    settings = spec(
        encode_chunk_frames=None, decode_chunk_frames=3, clips_at_once=1, tiling=True, tile_size=(64, 96)
    )
    vae = build_vae(settings, device="meta")
    assert (vae.encode_chunk_frames, vae.decode_chunk_frames, vae.clips_at_once) == (None, 3, 1)
    assert vae.tiling == Tiling(height=64, width=96, overlap_height=40, overlap_width=72)
    assert (vae.spatial_compression, vae.temporal_compression, vae.z_channels) == (4, 4, 4)
    assert build_vae(spec(), device="meta").tiling is None
    assert build_vae(spec(), device="meta").sample_tiling == Tiling()
    assert build_vae(spec(tile_samples=False), device="meta").sample_tiling is None


def test_full_size_builds_on_the_meta_device():
    released = {
        "ch": 128,
        "ch_mult": (1, 2, 2, 4),
        "num_res_blocks": 3,
        "z_channels": 16,
        "norm_num_groups": 32,
    }
    vae = build_vae(spec(released), device="meta")
    assert sum(weight.numel() for weight in vae.parameters()) == 215_583_907  # the released VAE's
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_dtype_arrive_frozen_in_the_one_asked_for(dtype):
    settings = spec()
    shapes = build_vae(settings, device="meta").state_dict()
    given = {name: torch.full(weight.shape, 0.5, dtype=torch.float16) for name, weight in shapes.items()}
    vae = build_vae(settings, state_dict=given, dtype=dtype)
    assert not vae.training
    assert not any(weight.requires_grad for weight in vae.parameters())
    assert all((weight == 0.5).all() and weight.dtype == dtype for weight in vae.parameters())
    assert not vae.encode_moments(torch.zeros(1, 1, 3, 8, 8))[0].requires_grad


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("encode_chunk_frames=6", "encode_chunk_frames = 6: expected .* a multiple of 4"),
        ("tile_size=[60,96]", r"tile_size = \[60, 96\]: expected multiples of 8 pixels"),
        ("tile_overlap=[240,72]", "tile_overlap = .* expected multiples of 8 pixels below tile_size"),
        ("encoder_config.params.norm_num_groups=5", "norm_num_groups = 5: expected a divisor of all widths"),
        (
            "encoder_config.params.temporal_compress_times=3",
            "temporal_compress_times = 3: expected a power of two",
        ),
        ("decoder_config.params.ch=16", "decoder_config.params.ch = 16: expected 8, as the encoder's"),
    ],
)
def test_settings_that_do_not_divide_evenly_are_faults(word, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(base=["configs/model/cogvideox_tiny.yaml"], words=[f"{VAE}.{word}"], purpose="check")


@pytest.mark.parametrize(
    ("device", "dtype", "version", "warned"),
    [
        ("cuda", torch.bfloat16, 91002, True),
        ("cuda", torch.float16, 91499, True),
        ("cuda", torch.bfloat16, None, True),
        ("cuda", torch.bfloat16, 91500, False),
        ("cuda", torch.float32, 91002, False),
        ("cpu", torch.bfloat16, 91002, False),
    ],
)
def test_an_old_cudnn_is_named_before_memory_runs_out(device, dtype, version, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(logging.getLogger("sat_train"), "propagate", True)
    warn_of_slow_conv3d(torch.device(device), dtype)
    assert ("pip install -U nvidia-cudnn" in caplog.text) is warned
