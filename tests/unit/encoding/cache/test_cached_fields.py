"""Encodings of fields from the cache equal those without one; a changed file is encoded again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sat_train.config import load_run_config
from sat_train.data.build import build_train_loader
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.build import build_encoding
from sat_train.errors import DataError
from tests.unit.data.videos import make_folder, write_numbered

CONDITIONS = ["control.target=ControlVideo", "control.params.field=control"]


def write_control(root, name, *, start=0):
    """Writes a control video that was last changed long ago, as the cache only remembers such files."""
    path = root / "control" / f"{name}.mp4"
    write_numbered(path, num_frames=30 + start, rate=15, height=16, width=24)
    os.utime(path, ns=(10**18 + start, 10**18 + start))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = make_folder(tmp_path_factory.mktemp("set") / "set", "ab", num_frames=60, height=32, width=48)
    for name in "ab":
        write_control(root, name)
    return [
        *(f"args.train_data=[{root}]", f"data.cache_dir={root.parent / 'cache'}", "args.split=1,0,0"),
        *("data.params.video_size=[16,16]", "data.params.max_num_frames=5", "data.params.views=2"),
        *(
            "data.fields.control.kind=video",
            "args.num_workers=0",
            "args.eval_interval=null",
            "args.valid_video_interval=null",
        ),
        *("args.batch_size=2", "deepspeed.train_micro_batch_size_per_gpu=2"),
        *(f"model.conditions.{word}" for word in CONDITIONS),
    ]


def encodings(words, mode, batches=2):
    """Returns the first batches of a run, encoded."""
    config = load_run_config(["configs/sft.yaml"], [*words, f"data.cache={mode}"], check_paths=False)
    mesh = start_single_process()
    stage = build_encoding(config, mesh)
    loader = build_train_loader(config, mesh, headers=stage.headers, reader_of=stage.reader)
    encode = stage.build_encode(mesh)
    if mode != "require":
        stage.encoders.load()
    batches = [encode(next(loader)) for _ in range(batches)]
    if hasattr(encode, "writer"):
        encode.writer.publish()
    return [batch.encodings for batch in batches]


def test_a_run_from_the_cache_encodes_fields_as_one_without(words):
    plain, filled, read = (encodings(words, mode) for mode in ("off", "fill", "require"))
    assert plain[0]["control"]["mean"].shape[1:] == plain[0]["clip"]["mean"].shape[1:]
    assert not torch.equal(plain[0]["control"]["mean"], plain[0]["clip"]["mean"])
    for other in (filled, read):
        for ours, theirs in zip(plain, other, strict=True):
            assert ours.keys() == theirs.keys()
            for name, tensors in ours.items():
                assert all(torch.equal(tensor, theirs[name][part]) for part, tensor in tensors.items()), name


def test_a_changed_field_is_not_read_from_the_cache(words):
    encodings(words, "fill")
    write_control(Path(words[0].removeprefix("args.train_data=[").removesuffix("]")), "a", start=1)
    with pytest.raises(DataError, match=r"a\.mp4: control not in the cache, with data\.cache = require"):
        encodings(words, "require")
