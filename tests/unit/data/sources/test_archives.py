"""Clips inside other files: tar archives and Hugging Face datasets."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from sat_train.data.sources.read import read_source
from sat_train.errors import DataError
from tests.unit.data.test_dataset import make
from tests.unit.data.videos import numbers_of, write_numbered


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 30 frames a second, as bytes."""
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    write_numbered(path, num_frames=60, rate=30)
    return path.read_bytes()


def pack(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read_right(source):
    """Reads every clip of a source and compares numbers with times."""
    dataset = make(source.records)
    for index in range(len(source)):
        result = dataset[index]
        assert result.failures == ()
        assert numbers_of(result.sample.video_tchw) == [round(time * 30) for time in result.sample.times]


def test_members_of_archives_are_clips(tmp_path, clip):
    other = json.dumps({"caption": "second", "id": 7}).encode()
    pack(tmp_path / "1.tar", {"b.mp4": clip, "b.json": other, "x/c.txt": b"of c", "x/c.mp4": clip})
    pack(tmp_path / "0.tar", {"a.txt": b"first\n", "a.mp4": clip, "readme.md": b"x", ".hidden.mp4": b"x"})
    source = read_source(tmp_path)
    assert [(record.clip_id, record.captions) for record in source.records] == [
        ("0.tar/a.mp4", ("first",)),
        ("1.tar/b.mp4", ("second",)),
        ("1.tar/x/c.mp4", ("of c",)),
    ]
    assert source.ignored == ((".md", 1),)
    read_right(source)
    assert len(read_source(tmp_path / "0.tar")) == 1


def test_members_without_caption_are_named(tmp_path, clip):
    pack(tmp_path / "a.tar", {"a.mp4": clip, "b.mp4": clip, "b.json": b"[]", "c.mp4": clip, "c.txt": b"c"})
    with pytest.raises(DataError) as caught:
        read_source(tmp_path / "a.tar")
    text = str(caught.value)
    assert "2 of 3 clips have no usable caption" in text
    assert "a.tar/a.mp4: there is no .txt or .json next to it" in text
    assert "a.tar/b.mp4: its .json has no `caption`" in text


def test_broken_and_compressed_archives_are_refused(tmp_path, clip):
    pack(tmp_path / "whole.tar", {"a.mp4": clip, "a.txt": b"x"})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[: len(clip) // 2])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(tmp_path / "whole.tar", "a.mp4")
    for name in ("cut.tar", "packed.tar"):
        with pytest.raises(DataError, match=rf"{name}: this archive cannot be read"):
            read_source(tmp_path / name)
    pack(tmp_path / "empty.tar", {"readme.md": b"x"})
    with pytest.raises(DataError, match="there is no clip in these archives"):
        read_source(tmp_path / "empty.tar")


def save_dataset(folder, rows, schema=None):
    """Writes what `datasets.Dataset.save_to_disk` writes, in two files."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir()
    half = (len(rows) + 1) // 2
    files = []
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            table = pa.Table.from_pylist(part, schema=schema)
            name = f"data-{number:05d}-of-00002.arrow"
            with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
            files.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_videos_inside_a_dataset_are_read_from_its_files(tmp_path, clip, kind):
    pa = pytest.importorskip("pyarrow")
    video = {
        "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "binary": pa.binary(),
        "large_binary": pa.large_binary(),
    }[kind]
    schema = pa.schema([("video", video), ("caption", pa.string()), ("start", pa.float64())])
    rows = [
        {"video": {"bytes": clip, "path": f"{i}.mp4"} if kind == "struct" else clip, "caption": f"clip {i}"}
        for i in range(5)
    ]
    rows[3]["start"] = 0.5
    source = read_source(save_dataset(tmp_path / "set", rows, schema))
    assert [record.captions for record in source.records] == [(f"clip {i}",) for i in range(5)]
    assert source.records[3].start == 0.5
    assert source.records[1].clip_id == ("row-000001/1.mp4" if kind == "struct" else "row-000001")
    read_right(source)


def test_videos_named_by_a_dataset_are_files(tmp_path, clip):
    rows = [{"video": "clips/a.mp4", "caption": ["one", "uno"], "weight": 2.0}]
    folder = save_dataset(tmp_path / "set", rows)
    (folder / "clips").mkdir()
    (folder / "clips" / "a.mp4").write_bytes(clip)
    source = read_source(folder)
    assert source.records[0].path == folder / "clips" / "a.mp4"
    assert (source.records[0].captions, source.records[0].weight) == (("one", "uno"), 2.0)
    read_right(source)


def test_datasets_that_cannot_be_used_are_refused(tmp_path):
    folder = save_dataset(tmp_path / "set", [{"video": "a.mp4", "caption": ""}])
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used:\n.*row 0: the caption .* is empty"):
        read_source(folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DataError, match="this dataset is a selection of the rows in its files"):
        read_source(folder)
    other = save_dataset(tmp_path / "other", [{"clip": "a.mp4", "caption": "x"}])
    with pytest.raises(DataError, match="there is no column `video`"):
        read_source(other)


def test_the_datasets_package_writes_what_is_read(tmp_path, clip):
    datasets = pytest.importorskip("datasets")
    rows = [{"video": {"bytes": clip, "path": f"{i}.mp4"}, "caption": f"clip {i}"} for i in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    source = read_source(tmp_path / "set")
    assert [record.captions for record in source.records] == [(f"clip {i}",) for i in range(4)]
    read_right(source)
