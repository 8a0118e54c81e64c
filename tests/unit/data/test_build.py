"""Loaders as a configuration describes them."""

from __future__ import annotations

import pytest

from sat_train.config import load_run_config
from sat_train.data.batches import DataPosition
from sat_train.data.build import build_train_loader, build_valid_loader, sum_bad_clips
from sat_train.distributed.processes import start_single_process
from sat_train.errors import DataError
from tests.unit.data.videos import make_folder


@pytest.fixture(scope="module")
def mesh():
    return start_single_process()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips of one second."""
    return make_folder(tmp_path_factory.mktemp("data") / "six", "abcdef", num_frames=30)


def load_config(*words, train=None):
    size = ["data.params.video_size=[32,32]", "data.params.max_num_frames=5", "data.params.fps=8"]
    run = ["args.train_iters=1", "args.num_workers=0", "args.batch_size=2", "data.params.max_upscale=8"]
    data = [] if train is None else [f"args.train_data=[{train}]"]
    return load_run_config([], [*size, *run, *data, *words], purpose="train", check_paths=False)


def test_the_shipped_clips_train_at_once(mesh):
    config = load_run_config(["configs/sft.yaml"], ["args.num_workers=0"], purpose="train", check_paths=False)
    loader = build_train_loader(config, mesh)
    batch = next(loader)
    assert len(batch.samples) == config.args.batch_size
    assert {tuple(sample.video_tchw.shape) for sample in batch.samples} == {(17, 3, 64, 96)}
    assert loader.epoch_length >= 42
    assert all(sample.caption for sample in batch.samples)
    valid = build_valid_loader(config, mesh)
    assert valid.num_samples == min(config.args.eval_iters * config.args.eval_batch_size, valid.epoch_length)


def test_settings_reach_the_data_set(mesh, folder):
    words = ["data.params.window=head", "data.params.skip_frms_num=3", "args.seed=9"]
    loader = build_train_loader(load_config(*words, train=folder), mesh, start=DataPosition(4))
    assert loader.position.consumed == 4
    batch = next(loader)
    assert batch.sample_indices == (4, 5)
    assert loader.dataset[4].sample.times[0] == pytest.approx(0.1)
    assert set(batch.clip_ids) < {f"six/videos/{name}.mp4" for name in "abcdef"}


def test_a_share_of_the_training_data_can_be_kept_for_validation(mesh, folder):
    config = load_config("args.split=1,1,0", train=folder)
    train, valid = build_train_loader(config, mesh), build_valid_loader(config, mesh)
    names = [
        {record.clip_id for source in loader.dataset.sources for record in source.records}
        for loader in (train, valid)
    ]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 6
    assert build_valid_loader(load_config(train=folder), mesh) is None
    assert train.fingerprint != valid.fingerprint


def test_clips_of_sets_with_the_same_name_are_distinguished(mesh, folder, tmp_path):
    other = make_folder(tmp_path / "six", "ab", num_frames=30)
    loader = build_train_loader(load_config(train=f"{folder},{other}"), mesh)
    names = [record.clip_id for source in loader.dataset.sources for record in source.records]
    assert len(set(names)) == 8
    assert loader.epoch_length == 8


def test_chunks_and_skipping_are_planned_before_the_first_sample(mesh, folder, tmp_path, caplog):
    make_folder(tmp_path / "set", ["long"], num_frames=90)
    make_folder(tmp_path / "set", ["short"], num_frames=9)
    words = ["data.params.window=chunks", "data.params.short_clip=skip"]
    with caplog.at_level("INFO", logger="sat_train"):
        loader = build_train_loader(load_config(*words, train=f"{folder},{tmp_path / 'set'}"), mesh)
    assert loader.epoch_length == 6 * 1 + 4
    assert "1 clips are left out (short): set/videos/short.mp4" in caplog.text
    assert "5x32x32              10 clips, 2 in a micro-batch, 40 tokens each" in caplog.text


def test_what_cannot_be_trained_on_is_refused(mesh, folder, tmp_path):
    with pytest.raises(DataError, match="there is no such folder or file"):
        build_train_loader(load_config(train=tmp_path / "nothing"), mesh)
    config = load_config("data.params.max_num_frames=49", "data.params.short_clip=skip", train=folder)
    with pytest.raises(DataError, match="no clip is left"):
        build_train_loader(config, mesh)


def test_bad_clips_of_all_ranks_are_summed(mesh, folder, tmp_path):
    make_folder(tmp_path / "set", "ab", num_frames=30)
    (tmp_path / "set/videos/b.mp4").write_bytes(b"x" * 99)
    config = load_config("data.max_bad_fraction=0.5", train=tmp_path / "set")
    loader = build_train_loader(config, mesh, run_directory=tmp_path / "run")
    next(loader)
    assert sum_bad_clips(mesh, loader) == 1
    assert (tmp_path / "run" / "quarantine.jsonl").read_text().count("\n") == 1
