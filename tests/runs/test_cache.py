"""Training from the cache is training: the same losses, bit for bit, without T5 and autoencoder.

SAT_TRAIN_KILLS=20 kills twenty times what fills it.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from sat_train.distributed.processes import start_single_process
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.prune import Staleness, list_entries, verify_entries
from sat_train.encoding.cache.shards import read_header
from sat_train.encoding.precompute import precompute, precompute_until_stopped
from sat_train.errors import DataError, Stopped
from sat_train.training.models import build_models, find_start_weights
from sat_train.training.run_data import open_data
from tests.ranks.encoded_runs import load_run, make_set, make_vae
from tests.runs.launching import wait_until

KILLS = int(os.environ.get("SAT_TRAIN_KILLS", "8"))
RECIPES = {
    "text to video": ["args.batch_size=2"],
    "image to video": [
        "args.batch_size=2",
        "model.noised_image_input=true",
        "model.network_config.params.in_channels=32",
    ],
    "buckets": ["args.batch_size=1", "data.params.buckets={sizes: [[64,64]], frames: [1], max_tokens: 90}"],
    "padded": ["args.batch_size=1", "data.params.max_num_frames=29", "data.params.short_clip=pad"],
    "limited views": ["args.batch_size=2", "data.params.views=2", "model.null_condition=empty_prompt"],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("encoded")
    return [
        *(f"args.train_data=[{make_set(folder / 'set', 'abc')}]", "args.train_iters=3"),
        *(
            f"args.valid_data=[{make_set(folder / 'valid', 'd')}]",
            "args.eval_interval=3",
            "args.save_interval=3",
        ),
        *("args.eval_iters=1", "args.eval_batch_size=1", "args.valid_video_interval=null"),
        f"model.first_stage_config.params.ckpt_path={make_vae(folder / 'vae.pt')}",
    ]


def losses(words: list[str]) -> tuple[list[float], bool]:
    """Returns the losses of three steps and of a validation, and whether the encoders were loaded."""
    config, mesh = load_run(words), start_single_process()
    data = open_data(config, mesh)
    pipeline = build_models(
        config,
        mesh,
        find_start_weights(config, mesh),
        data.encoding.encoders,
        with_encoders=data.needs_encoders,
    )
    encode = data.encoding.build_encode(mesh)
    values = []
    with torch.no_grad():
        for _ in range(3):
            values += pipeline.training_loss(encode(next(data.train))).loss_b.tolist()
        for batch in data.valid:
            timesteps_b = torch.tensor([500])
            values += pipeline.validation_loss(encode(batch), timesteps_b=timesteps_b).loss_b.tolist()
    if config.data.cache == "fill":
        encode.writer.publish_or_warn()
    return values, data.needs_encoders


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_have_the_same_bits_with_and_without_the_cache(words, tmp_path: Path, recipe: str) -> None:
    words = [*words, *RECIPES[recipe], f"data.cache_dir={tmp_path}"]
    without, loaded = losses([*words, "data.cache=off"])
    assert loaded
    assert losses([*words, "data.cache=fill"]) == (without, True)
    assert losses([*words, "data.cache=fill"]) == (without, False)
    assert losses([*words, "data.cache=require"]) == (without, False)
    assert losses([*words, "data.cache=read"]) == (without, False)


def test_a_damaged_entry_is_encoded_again_and_its_neighbours_are_read(words, tmp_path: Path, caplog) -> None:
    """An entry loses a bit while its header says that all is there, so no encoder was loaded at first."""
    words = [*words, *RECIPES["limited views"], f"data.cache_dir={tmp_path}"]
    without, _ = losses([*words, "data.cache=fill"])
    (shard,) = (tmp_path / "shards").iterdir()
    header = read_header(shard)
    key = next(key for key, info in header.entries.items() if info.kind == "clip" and "set/" in info.name)
    data = bytearray(shard.read_bytes())
    data[header.slots[key]["mean"].offset + 3] ^= 0x40
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged in the cache[\s\S]*contents changed[\s\S]*prune --damaged"):
        losses([*words, "data.cache=require"])
    caplog.clear()
    assert losses([*words, "data.cache=read"]) == (without, False)
    assert caplog.text.count("damaged cache entry, treated as missing") == 1
    assert "loading the VAE" in caplog.text
    assert losses([*words, "data.cache=fill"]) == (without, False)
    assert len(list((tmp_path / "shards").iterdir())) == 2, "what was encoded again is kept"
    assert losses([*words, "data.cache=require"]) == (without, False)


def test_a_cache_that_cannot_be_written_is_read(words, tmp_path: Path, caplog) -> None:
    """Files stand where folders would be made, as permissions do not hold for everybody who tests."""
    words = [*words, f"data.cache_dir={tmp_path}"]
    without, _ = losses([*words, "data.cache=fill"])
    shutil.rmtree(tmp_path / "files")
    (tmp_path / "files").write_text("in the way")
    for mode in ("read", "require"):
        caplog.clear()
        assert losses([*words, f"data.cache={mode}"]) == (without, False)
        assert caplog.text.count("the next run must hash these files again") == 1


def test_a_full_disk_ends_precompute_and_no_run_that_fills_the_cache(
    words, tmp_path: Path, caplog, monkeypatch
) -> None:
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sat_train.encoding.cache.shards.write_file", fail)
    words = [*words, f"data.cache_dir={tmp_path}", "data.cache_shard_mb=0.001", "data.cache=fill"]
    assert losses(words)[0] == losses([*words, "data.cache=off"])[0]
    assert caplog.text.count("training continues, and encoded samples wait in memory") == 1
    assert "encodings are lost and will be computed again by the next run" in caplog.text
    # known before an encoder is loaded
    monkeypatch.setattr("sat_train.models.encoders.Encoders.load", None)
    with pytest.raises(DataError, match=r"No space left on device[\s\S]*free some space"):
        precompute(load_run(words[:-1], purpose="precompute"), start_single_process())


def test_precompute_encodes_what_training_reads(words, tmp_path: Path) -> None:
    words = [*words, *RECIPES["image to video"], f"data.cache_dir={tmp_path}"]
    with pytest.raises(DataError, match=r"data.cache = require, and 7 of 7"):
        losses([*words, "data.cache=require"])
    precompute(load_run(words, purpose="precompute"), start_single_process())
    assert losses([*words, "data.cache=require"]) == (losses(words)[0], False)
    shards = sorted((tmp_path / "shards").iterdir())
    precompute(load_run(words, purpose="precompute"), start_single_process())
    assert sorted((tmp_path / "shards").iterdir()) == shards, "all was there"


def test_another_autoencoder_misses(words, tmp_path: Path) -> None:
    words = [*words, f"data.cache_dir={tmp_path / 'cache'}", "data.params.views=1"]
    precompute(load_run(words, purpose="precompute"), start_single_process())
    other = make_vae(tmp_path / "other.pt", seed=1)
    with pytest.raises(DataError, match="not in"):
        losses([*words, f"model.first_stage_config.params.ckpt_path={other}", "data.cache=require"])


def encode(words: list[str]) -> None:
    """Runs precompute in a process of its own, as a fork: it need not import everything again."""
    torch.set_num_threads(1)
    precompute(load_run(words, purpose="precompute"), start_single_process())


def keys_in(cache: Path) -> set[str]:
    return {key for shard in (cache / "shards").iterdir() for key in read_header(shard).entries}


def encode_until_stopped(words: list[str]) -> None:
    torch.set_num_threads(1)
    try:
        precompute_until_stopped(load_run(words, purpose="precompute"), start_single_process())
    except Stopped as stopped:
        print(stopped, flush=True)
        os._exit(stopped.exit_code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_precompute_after_the_clip_and_it_continues_there(
    words, tmp_path, capfd, number
) -> None:
    cache = tmp_path / "cache"
    words = [*words, f"data.cache_dir={cache}", "data.params.views=40", "data.cache_shard_mb=0.05"]
    process = multiprocessing.get_context("fork").Process(target=encode_until_stopped, args=(words,))
    process.start()
    wait_until(lambda: num_shards(cache) > 0 or process.exitcode is not None)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    output = "".join(capfd.readouterr())
    assert "stopped: finished samples are kept; run the command again to continue" in output
    assert "Traceback" not in output
    whole, faults = verify_entries(cache)
    assert not faults
    assert 0 < whole < 3 * 40
    words = [*words, "data.params.views=1"]
    encode(words)
    lines, _ = list_entries(cache, Staleness(FileMetadata(cache)))
    assert not any(line.stale for line in lines), "nothing is encoded again"


@pytest.mark.slow
def test_kills_leave_no_torn_entry_and_cost_no_published_work(words, tmp_path: Path) -> None:
    """Each start continues where the last one was killed; the last one runs to its end."""
    rng, cache = random.Random(3), tmp_path / "cache"
    words = [*words, f"data.cache_dir={cache}", "data.params.views=15", "data.cache_shard_mb=0.05"]
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    reached = 0
    for attempt in range(KILLS):
        process = context.Process(target=encode, args=(words,))
        before = num_shards(cache)
        process.start()
        if attempt % 2:  # while it encodes; else at any moment, the beginning too
            wait_until(
                lambda before=before, process=process: num_shards(cache) > before or process.exitcode == 0
            )
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.join()
        if num_shards(cache):
            whole, faults = verify_entries(cache)
            assert not faults
            assert whole >= reached, "what was published stays"
            reached = whole
    assert reached > 0
    encode(words)
    lines, damaged = list_entries(cache, Staleness(FileMetadata(cache)))
    assert not damaged
    assert not any(line.stale for line in lines), "nothing was encoded again that was published"
    encode([*words[:-3], f"data.cache_dir={tmp_path / 'straight'}", *words[-2:]])
    assert keys_in(cache) == keys_in(tmp_path / "straight")


def num_shards(cache: Path) -> int:
    return len(list(cache.glob("shards/*.safetensors")))
