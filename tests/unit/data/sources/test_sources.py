"""Folders and manifests: what is a clip, where its caption is, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from sat_train.data.sources.read import read_source, split_source
from sat_train.errors import DataError
from tests.unit.data.videos import make_folder


def place(root, *names, caption="a caption"):
    """Makes empty files: reading a source opens no video."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{caption}\n" if name.endswith(".txt") else "x", encoding="utf-8")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    names = ["b", "a", "sub/c", "Z"]
    make_folder(tmp_path / "set", names, num_frames=2)
    source = read_source(tmp_path / "set")
    assert [record.clip_id for record in source.records] == [
        "videos/Z.mp4",
        "videos/a.mp4",
        "videos/b.mp4",
        "videos/sub/c.mp4",
    ]
    assert [record.captions for record in source.records][3] == ("clip sub/c",)
    assert all(record.path.is_absolute() for record in source.records)


def test_only_the_last_folder_called_videos_is_exchanged(tmp_path):
    root = tmp_path / "videos_2024" / "videos" / "project"
    place(root, "videos/videos.mp4", "labels/videos.txt")
    assert read_source(root).records[0].captions == ("a caption",)


def test_captions_may_be_next_to_their_clips(tmp_path):
    place(tmp_path, "a.mp4", "a.txt", "deep/b.MOV", "deep/b.txt")
    assert [record.clip_id for record in read_source(tmp_path).records] == ["a.mp4", "deep/b.MOV"]


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path):
    place(tmp_path, "videos/a.mp4", "labels/a.txt", "videos/notes.json", "videos/.b.mp4", "README", "x.json")
    source = read_source(tmp_path)
    assert len(source) == 1
    assert source.ignored == (("(none)", 1), (".json", 2))


def test_images_are_clips_under_videos_and_conditions_under_images(tmp_path):
    place(
        tmp_path, "videos/a.mp4", "labels/a.txt", "images/a.png", "videos/b.jpg", "labels/b.txt", "cover.jpg"
    )
    first, second = read_source(tmp_path).records
    assert first.image == tmp_path / "images" / "a.png"
    assert (second.clip_id, second.image) == ("videos/b.jpg", None)


def test_links_are_followed_once(tmp_path):
    place(tmp_path / "real", "videos/a.mp4", "labels/a.txt")
    (tmp_path / "real" / "videos" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "set").symlink_to(tmp_path / "real")
    assert len(read_source(tmp_path / "set")) == 1


def test_several_lines_of_a_caption_are_joined(tmp_path):
    place(tmp_path, "videos/a.mp4")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_bytes("\ufeffa red  ball\r\n\nbounces – hoch\n".encode())
    assert read_source(tmp_path).records[0].captions == ("a red ball bounces – hoch",)


def test_all_clips_without_caption_are_reported_at_once(tmp_path):
    place(tmp_path, *(f"videos/{i:02d}.mp4" for i in range(14)), "labels/00.txt", "labels/01.txt")
    place(tmp_path, "labels/02.txt", caption=" ")
    (tmp_path / "labels" / "03.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as caught:
        read_source(tmp_path)
    text = str(caught.value)
    assert "12 of 14 clips have no usable name and caption" in text
    assert "labels/02.txt is empty" in text
    assert "labels/03.txt is not UTF-8 (byte 3)" in text
    assert "there is no caption file" in text
    assert "and 2 more" in text


def test_an_empty_or_missing_place_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no clip in this folder"):
        read_source(tmp_path)
    with pytest.raises(DataError, match="there is no such folder or file"):
        read_source(tmp_path / "nothing")
    place(tmp_path, "clips.xlsx")
    with pytest.raises(DataError, match="a file of this suffix is no data set"):
        read_source(tmp_path / "clips.xlsx")


ROWS = [
    {"video": "b.mp4", "caption": "two", "start": 1.5, "end": 4, "weight": 2, "score": 0.3},
    {"video": "a.mp4", "caption": ["one", "uno"], "image": "a.png"},
]


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        keys = list({key: None for row in rows for key in row})
        lines = [",".join(keys), *(",".join(str(row.get(key, "")) for key in keys) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        keys = {key for row in rows for key in row}
        parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(keys) | row for row in rows]), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_manifests_of_all_kinds_give_the_same_records(tmp_path, suffix):
    rows = [dict(row, caption="one" if isinstance(row["caption"], list) else row["caption"]) for row in ROWS]
    first, second = read_source(write_table(tmp_path / f"m{suffix}", rows)).records
    assert (first.clip_id, first.path, first.captions) == ("a.mp4", tmp_path / "a.mp4", ("one",))
    assert (first.image, first.start, first.end, first.weight) == (tmp_path / "a.png", None, None, 1.0)
    assert (second.clip_id, second.start, second.end, second.weight) == ("b.mp4[1.5-4]", 1.5, 4.0, 2.0)


def test_a_manifest_may_hold_several_captions(tmp_path):
    first, _ = read_source(write_table(tmp_path / "m.jsonl", ROWS)).records
    assert first.captions == ("one", "uno")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "x"}, "column `video` is missing"),
        ({"video": "a.mp4"}, "column `caption` is missing"),
        ({"video": "a.mp4", "caption": "  "}, "the caption in column `caption` is empty"),
        ({"video": "a.mp4", "caption": [1]}, "column `caption` is missing or not a text"),
        ({"video": "a.mp4", "caption": "x" * 30_000}, "has 30000 characters"),
        ({"video": "a.mp4", "caption": "x", "start": "soon"}, "`start` = 'soon' is not a number"),
        ({"video": "a.mp4", "caption": "x", "start": 3, "end": 2}, "`end` = 2 is not after `start` = 3"),
        ({"video": "a.mp4", "caption": "x", "weight": -1}, "`weight` = -1 is not a finite number"),
    ],
)
def test_unusable_rows_are_named_by_line(tmp_path, row, message):
    path = write_table(tmp_path / "m.jsonl", [ROWS[0], row])
    with pytest.raises(DataError) as caught:
        read_source(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)


def test_broken_tables_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n{"video": \n')
    with pytest.raises(DataError, match=r"a.jsonl:2: this is not JSON"):
        read_source(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("video,caption\na.mp4,one,two\n")
    with pytest.raises(DataError, match=r"a.csv:2: more cells than the header has columns"):
        read_source(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("video,caption\n")
    with pytest.raises(DataError, match="this manifest has no rows"):
        read_source(tmp_path / "b.csv")


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    place(tmp_path / "one", "videos/a.mp4", "labels/a.txt", "videos/b.mp4", "labels/b.txt")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = read_source(tmp_path / "one").fingerprint
    assert read_source(tmp_path / "two").fingerprint == before
    (tmp_path / "two/videos/b.mp4").write_text("longer")
    assert read_source(tmp_path / "two").fingerprint != before
    shutil.copy(tmp_path / "one/videos/b.mp4", tmp_path / "two/videos/b.mp4")
    (tmp_path / "two/labels/b.txt").write_text("another caption")
    assert read_source(tmp_path / "two").fingerprint != before


def test_splits_are_disjoint_complete_and_stable(tmp_path):
    place(tmp_path, *(f"videos/{i}.mp4" for i in range(200)), *(f"labels/{i}.txt" for i in range(200)))
    source = read_source(tmp_path)
    parts = [split_source(source, (8, 1, 1), part) for part in range(3)]
    names = [{record.clip_id for record in part.records} for part in parts]
    assert set().union(*names) == {record.clip_id for record in source.records}
    assert sum(map(len, names)) == 200
    assert 140 < len(names[0]) < 180
    (tmp_path / "videos/0.mp4").unlink()
    fewer = split_source(read_source(tmp_path), (8, 1, 1), 0)
    assert {record.clip_id for record in fewer.records} == names[0] - {"videos/0.mp4"}
    assert split_source(source, (1, 0, 0), 0).fingerprint == source.fingerprint


def test_a_name_that_is_no_text_is_refused_by_name(tmp_path):
    place(tmp_path, "videos/a.mp4", "labels/a.txt")
    (tmp_path / "videos" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"x")
    (tmp_path / "videos" / "two\nlines.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"2 of 3 clips have no usable name and caption") as caught:
        read_source(tmp_path)
    assert r"caf\udce9.mp4': its name is not a line of text in UTF-8" in str(caught.value)
    str(caught.value).encode()
