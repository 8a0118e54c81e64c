"""Parts of a set: none with a share is empty where there are clips for it, and an empty one is named."""

from __future__ import annotations

import pytest

from sat_train.data.sources.read import read_source, read_sources, split_source
from sat_train.data.sources.records import SourceOptions
from sat_train.errors import DataError
from tests.unit.data.sources.test_sources import place


def clips(root, count, first=0):
    for i in range(first, first + count):
        place(root, f"videos/clip{i}.mp4", f"labels/clip{i}.txt")
    return read_source(root)


@pytest.mark.parametrize("shares", [(95, 5, 0), (99.9, 0.1, 0), (1, 1, 1e-6), (0, 1, 1), (1e-9, 1, 0)])
@pytest.mark.parametrize("count", [3, 10, 40])
def test_each_part_with_a_share_has_a_clip(tmp_path, shares, count):
    source = clips(tmp_path, count)
    parts = [split_source(source, shares, part).records for part in range(3)]
    assert sorted((r for part in parts for r in part), key=lambda r: r.clip_id) == list(source.records)
    assert [len(part) > 0 for part in parts] == [share > 0 for share in shares]


def test_too_few_clips_go_to_the_first_parts(tmp_path):
    one, two = clips(tmp_path / "one", 1), clips(tmp_path / "two", 2)
    assert [len(split_source(one, (1, 98, 1), part)) for part in range(3)] == [1, 0, 0]
    assert [len(split_source(two, (1, 1, 98), part)) for part in range(3)] == [1, 1, 0]


def test_a_part_that_must_be_empty_is_named_as_what_it_is(tmp_path):
    clips(tmp_path / "one", 1)
    entries, options = [str(tmp_path / "one")], SourceOptions()
    with pytest.raises(DataError) as caught:
        read_sources(entries, options, shares=(95, 5, 0), part=1)
    assert f"the validation part of args.split=95,5,0 is empty: 0 of 1 clips of {tmp_path / 'one'}" in str(
        caught.value
    )
    assert "args.split=1,0,0" in caught.value.remedy
    (source,) = read_sources(entries, options, shares=(1, 0, 0), part=0)
    assert len(source) == 1
    with pytest.raises(DataError, match=r"the training part of args.split=0,1,0 is empty"):
        read_sources(entries, options, shares=(0, 1, 0), part=0)


def test_validation_does_without_an_entry_too_small_for_it(tmp_path):
    clips(tmp_path / "one", 1)
    clips(tmp_path / "ten", 10)
    entries = [str(tmp_path / "one"), str(tmp_path / "ten")]
    (valid,) = read_sources(entries, SourceOptions(), shares=(95, 5, 0), part=1)
    assert (valid.name, len(valid), valid.part) == (entries[1], 1, "its validation part, 1 of 10 clips")
    train = read_sources(entries, SourceOptions(), shares=(95, 5, 0), part=0)
    assert [len(source) for source in train] == [1, 9]


@pytest.mark.parametrize("weights", [[0, 0.0], [1e-300, 0], [1e6] * 101])
def test_weights_that_make_no_epoch_are_refused(tmp_path, weights):
    """The first two rows are those of a manifest that ended a run in the order of samples."""
    rows = "".join(
        f'{{"video": "{i}.mp4", "caption": "a", "weight": {weight}}}\n' for i, weight in enumerate(weights)
    )
    (tmp_path / "m.jsonl").write_text(rows)
    entries = [str(tmp_path / "m.jsonl")]
    with pytest.raises(DataError, match=rf"the weights of its {len(weights)} clips sum up to "):
        read_sources(entries, SourceOptions(), shares=None, part=0)
    (valid,) = read_sources(entries, SourceOptions(), shares=None, part=1)  # weights mean nothing there
    assert len(valid) == len(weights)
