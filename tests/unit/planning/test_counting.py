"""Counts of runs on the meta device: chunks that are counted once, operations that are derived once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.models import meters
from sat_train.models.meta_models import build_meta_latent, build_meta_vae
from sat_train.models.meters import RunMeter
from sat_train.planning.counting import Count, Work, count_decoding, count_encoding, count_passes

# three rows and three columns of tiles, the last of each smaller; three chunks, the first longer
CLIP = ("data.params.max_num_frames=25", "data.params.video_size=[112,144]")
TILES = tuple(
    f"model.first_stage_config.params.{word}"
    for word in ("tiling=true", "tile_size=[48,64]", "tile_overlap=[8,16]", "encode_chunk_frames=8")
)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    start_single_process()
    yield
    stop_processes()


def _read(recipe: str, *words: str) -> RunConfig:
    files = ["configs/model/cogvideox_tiny.yaml", f"configs/{recipe}.yaml"]
    return load_run_config(files, words, purpose="check", check_paths=False)


def test_chunks_that_do_not_run_count_as_if_they_did() -> None:
    config = _read("sft", *CLIP, *TILES)
    vae = build_meta_vae(config)
    latent = build_meta_latent(config, 1, vae.z_channels)
    clip = torch.empty(1, 25, 3, 112, 144, device="meta")
    for counted, run in (
        (count_decoding(config), lambda: vae.decode(latent, vae.sample_tiling)),
        (count_encoding(config), lambda: vae.encode_moments(clip)),
    ):
        with RunMeter(vae) as meter:
            run()
        work = Work(meter.traffic.moved, meter.flops.linear, 0, 0, 0)
        assert counted == Count(meter.living.peak, work)


@pytest.mark.parametrize(("recipe", "policy"), [("sft", "off"), ("sft", "gemm"), ("lora", "full")])
def test_operations_that_do_not_run_count_as_if_they_did(
    monkeypatch: pytest.MonkeyPatch, recipe: str, policy: str
) -> None:
    config = _read(recipe, f"args.checkpoint_activations={policy}")
    counted = count_passes(config, batch_size=2)
    monkeypatch.setattr(meters, "run_on_meta", lambda func, args, kwargs: func(*args, **kwargs))
    assert count_passes(config, batch_size=2) == counted
