"""Nothing that is given is dropped in silence, and the layouts that people have are read."""

from __future__ import annotations

import json

import pytest

from sat_train.data.sources.read import read_source
from sat_train.data.sources.records import SourceOptions
from sat_train.errors import DataError
from tests.unit.data.sources.test_sources import place


def lists(root, videos, captions, name="prompt.txt"):
    (root / "videos.txt").write_text(videos)
    (root / name).write_text(captions)


def accounted(root):
    """Returns the files of a folder that a source neither uses nor counts."""
    source = read_source(root)
    files = [path for path in root.rglob("*") if path.is_file()]
    used = {record.path for record in source.records} | {record.image for record in source.records}
    labels = {
        p for p in files if p.suffix.lower() == ".txt" and any(p.stem == r.path.stem for r in source.records)
    }
    counted = sum(count for _, count in source.ignored)
    assert len(files) == len({path for path in used | labels if path}) + counted
    return source


@pytest.mark.parametrize("suffix", ["JPG", "jpeg", "PNG", "webp", "bmp", "TIFF"])
def test_the_picture_of_a_clip_may_have_any_suffix_in_any_case(tmp_path, suffix):
    place(tmp_path, "videos/a.MP4", "labels/a.TXT", f"images/a.{suffix}", "videos/b.mp4", "labels/b.txt")
    source = accounted(tmp_path)
    assert source.records[0].image == tmp_path / f"images/a.{suffix}"
    assert source.notes == (
        "1 clips have no image in images/ (their first frame is the condition): videos/b.mp4",
    )


def test_every_file_is_used_or_counted_and_named(tmp_path):
    """Pictures beside clips, as in the layout of many image trainers, pictures and captions of no clip."""
    place(tmp_path, "c0.mp4", "c0.txt", "img0.png", "img0.txt", "img1.JPG", "sub/notes.md", "prompt.txt")
    source = accounted(tmp_path)
    assert source.ignored == ((".jpg", 1), (".md", 1), (".png", 1), (".txt", 2))
    text = "\n".join(source.notes)
    assert (
        "2 pictures are neither images/NAME of a clip videos/NAME nor in videos/: img0.png, img1.JPG" in text
    )
    assert "2 text files have the name of no clip: img0.txt, prompt.txt" in text
    place(tmp_path / "i2v", "videos/a.mp4", "labels/a.txt", "images/z.png", "labels/z.txt", "images/a.png")
    place(tmp_path / "i2v", "images/a.bmp", "videos/.b.mp4")
    text = "\n".join(read_source(tmp_path / "i2v").notes)
    pictures = "2 pictures are neither images/NAME of a clip videos/NAME nor in videos/"
    assert f"{pictures}: images/a.png, images/z.png" in text  # a.bmp is the picture of a.mp4
    assert "1 text files have the name of no clip: labels/z.txt" in text
    assert "1 hidden files or folders are not read: videos/.b.mp4" in text


def test_a_folder_without_clips_says_what_it_holds(tmp_path):
    place(tmp_path, "img0.png", "img0.txt", "readme.md")
    with pytest.raises(DataError) as caught:
        read_source(tmp_path)
    text = str(caught.value)
    assert "Other files found: 1 .md, 1 .png, 1 .txt (img0.png, img0.txt)" in text
    assert "pictures are clips of one frame in a folder `videos`" in text


def test_folders_of_frames_are_said_not_to_be_read(tmp_path):
    place(tmp_path / "a", *(f"clip1/{i:04d}.png" for i in range(9)))
    place(tmp_path / "b", *(f"videos/clip1/{i:04d}.jpg" for i in range(9)))
    for name in "ab":
        with pytest.raises(DataError, match=r"Folders of frames \(clip1, ...\) are not read"):
            read_source(tmp_path / name)
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": "a/clip1", "caption": "x"}))
    with pytest.raises(DataError, match="`video` names a folder; folders of frames are not read"):
        read_source(tmp_path / "m.jsonl")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """Root may list every folder, so the system's answer stands in for the missing permission."""
    import os

    place(tmp_path, "videos/a.mp4", "labels/a.txt", "videos/locked/b.mp4")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked: this folder cannot be listed: Permission denied"):
        read_source(tmp_path)


@pytest.mark.parametrize("name", ["prompt.txt", "prompts.txt", "captions.txt"])
def test_clips_and_captions_may_be_listed_line_by_line(tmp_path, name):
    """The layout of the best known CogVideoX training set and of its trainers."""
    place(tmp_path, "videos/b.mp4", "videos/a.mp4", "videos/unlisted.mp4", "images/a.PNG")
    lists(tmp_path, "videos/b.mp4\r\nvideos/a.mp4\r\n\r\n", "\ufeffof b \n of a\n", name)
    source = read_source(tmp_path)
    assert [(r.clip_id, r.captions) for r in source.records] == [
        ("videos/a.mp4", ("of a",)),
        ("videos/b.mp4", ("of b",)),
    ]
    assert [record.image for record in source.records] == [tmp_path / "images/a.PNG", None]
    assert "1 clips are not in videos.txt, and not used: videos/unlisted.mp4" in source.notes


def test_pictures_may_be_listed_too(tmp_path):
    place(tmp_path, "videos/a.mp4", "first/x.png")
    lists(tmp_path, "videos/a.mp4\n", "of a\n")
    (tmp_path / "images.txt").write_text("first/x.png\n")
    source = read_source(tmp_path)
    assert source.records[0].image == tmp_path / "first/x.png"
    assert (source.ignored, source.notes) == ((), ())


def test_lists_that_do_not_fit_are_refused(tmp_path):
    place(tmp_path, "videos/a.mp4", "videos/b.mp4")
    lists(tmp_path, "videos/a.mp4\nvideos/b.mp4\n", "one\n")
    with pytest.raises(DataError, match=r"different numbers of lines: videos.txt 2, prompt.txt 1"):
        read_source(tmp_path)
    lists(tmp_path, "videos/a.mp4\n\nvideos/b.mp4\n", "one\ntwo\n\n")
    assert [record.captions for record in read_source(tmp_path).records] == [("one",), ("two",)]
    lists(tmp_path, "videos/a.mp4\n\nvideos/b.mp4\n", "one\ntwo\nthree\n")
    with pytest.raises(DataError, match=r"videos.txt:2: line 2 of videos.txt is blank"):
        read_source(tmp_path)
    lists(tmp_path, "videos/a.mp4\n", "one\n")
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"prompt.txt and prompts.txt may both hold the captions"):
        read_source(tmp_path)
    (tmp_path / "prompts.txt").unlink()
    with pytest.raises(DataError, match="this list is one of a pair") as caught:
        read_source(tmp_path / "videos.txt")
    assert str(tmp_path) in caught.value.remedy


def test_an_incomplete_pair_of_lists_names_both_files(tmp_path):
    place(tmp_path, "videos/a.mp4")
    with pytest.raises(DataError, match=r"list clips in videos.txt and captions in prompt.txt, line by line"):
        read_source(tmp_path)
    (tmp_path / "videos.txt").write_text("videos/a.mp4\n")
    with pytest.raises(DataError, match=r"videos.txt is there, prompt.txt is missing"):
        read_source(tmp_path)
    (tmp_path / "videos.txt").rename(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=r"prompts.txt is there, videos.txt is missing"):
        read_source(tmp_path)


def test_captions_of_their_own_win_over_lists_and_that_is_said(tmp_path):
    place(tmp_path, "videos/a.mp4", "labels/a.txt")
    lists(tmp_path, "videos/a.mp4\n", "another\n")
    source = read_source(tmp_path)
    assert source.records[0].captions == ("a caption",)
    assert "2 text files have the name of no clip: prompt.txt, videos.txt" in source.notes


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_of_common_names_are_read_by_themselves(tmp_path):
    """Spellings of Hugging Face's VideoFolder, of finetrainers and of spreadsheets."""
    tables = [
        table(tmp_path / "a.jsonl", '{"file_name": "a.mp4", "text": "x", "id": 7}\n'),
        table(tmp_path / "b.csv", "\ufeffVideo_Path;Prompt;id\na.mp4;x;7\n"),
        table(tmp_path / "c.csv", "path\tid\tcaption\na.mp4\t7\tx\n"),
        table(tmp_path / "d.tsv", "media_path\tcaption\tid\na.mp4\tx\t7\n"),
        table(tmp_path / "e.json", '[{"file": "a.mp4", "prompt": "x", "id": 7}]'),
    ]
    for path in tables:
        source = read_source(path)
        assert [(r.clip_id, r.captions) for r in source.records] == [("a.mp4", ("x",))], path
        assert source.notes == ("columns that are not used: id",)


def test_a_column_of_the_very_name_wins_and_equal_ones_are_refused(tmp_path):
    source = read_source(table(tmp_path / "a.csv", "path,video,caption,text\nz.mp4,a.mp4,x,y\n"))
    assert source.records[0].clip_id == "a.mp4"
    assert source.records[0].captions == ("x",)
    with pytest.raises(DataError, match="each of the columns `text`, `prompt` may be the caption"):
        read_source(table(tmp_path / "b.csv", "video,text,prompt\na.mp4,x,y\n"))
    with pytest.raises(DataError, match="the column `video` stands in the header more than once"):
        read_source(table(tmp_path / "c.csv", "video,caption,video\na.mp4,x,b.mp4\n"))


def test_any_column_can_be_named(tmp_path):
    path = table(tmp_path / "a.csv", "wo;was;ab;oft;text\na.mp4;x;1.5;2;no\n")
    wanted = {"video": "wo", "caption": "was", "start": "ab", "weight": "oft"}
    (record,) = read_source(path, SourceOptions(columns=wanted)).records
    assert (record.clip_id, record.captions, record.start, record.weight) == ("a.mp4[1.5-]", ("x",), 1.5, 2.0)
    with pytest.raises(DataError, match=r"no column `was\?`; the columns found are `wo`, `was`") as caught:
        read_source(path, SourceOptions(columns={**wanted, "caption": "was?"}))
    assert "data.columns.caption" in caught.value.remedy


def test_a_missing_column_lists_those_found_and_the_way_out(tmp_path):
    with pytest.raises(
        DataError, match="no column `video`; the columns found are `cut`, `caption`"
    ) as caught:
        read_source(table(tmp_path / "a.csv", "cut,caption\na.mp4,x\n"))
    assert "data.columns.video=NAME" in caught.value.remedy


def test_json_that_is_no_list_of_objects_says_the_way_out(tmp_path):
    with pytest.raises(DataError, match="holds an object of `video`, `caption`") as caught:
        read_source(table(tmp_path / "a.json", '{"video": ["a.mp4"], "caption": ["x"]}'))
    assert "orient='records'" in caught.value.remedy
    with pytest.raises(DataError, match="Extra data") as caught:
        read_source(table(tmp_path / "b.json", '{"video": "a.mp4"}\n{"video": "b.mp4"}\n'))
    assert ".jsonl" in caught.value.remedy


def test_backslashes_of_windows_are_slashes_unless_such_a_file_exists(tmp_path):
    place(tmp_path, "videos/a.mp4", "odd\\b.mp4")
    source = read_source(table(tmp_path / "a.csv", "video,caption\nvideos\\a.mp4,x\nodd\\b.mp4,y\n"))
    assert [record.path for record in source.records] == [tmp_path / "odd\\b.mp4", tmp_path / "videos/a.mp4"]
    assert source.notes == ("1 paths hold backslashes, which are read as slashes",)
