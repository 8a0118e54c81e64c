"""Fields of samples: where they are found, what each kind gives, and what is said where one is missing."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import time
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sat_train.cli.main import main
from sat_train.config import load_run_config
from sat_train.config.extensions import load_extensions
from sat_train.config.parts.field_parts import FieldConfig
from sat_train.config.shapes import ClipShape
from sat_train.data.batches import OrderedBatches
from sat_train.data.clips.frames import FrameReader
from sat_train.data.failure_log import FailureLog
from sat_train.data.fields.number_files import read_numbers
from sat_train.data.loader import VideoLoader
from sat_train.data.sources.read import read_source
from sat_train.data.sources.records import FieldFile, SourceOptions
from sat_train.encoding.cache.entries import SampleFacts
from sat_train.errors import ConfigError, DataError
from sat_train.extend import BadClip
from tests.ranks.extensions import write_extensions
from tests.unit.data.videos import dataset_of, make_folder, numbers_of, write_numbered
from tests.unit.encoding.cache.samples import open_dataset

KINDS = {
    "control": {"kind": "video"},
    "inside": {"kind": "mask"},
    "reference": {"kind": "image"},
    "lost": {"kind": "pair", "count": 2},
    "camera": {"kind": "per_frame", "space": "intrinsics"},
    "seconds": {"kind": "per_frame", "fps": 10},
    "audio": {"kind": "array"},
    "scene": {"kind": "text"},
}
FRAMES = 60


def fields_of(kinds) -> dict[str, FieldConfig]:
    return {name: FieldConfig._choose(settings) for name, settings in kinds.items()}


def samples_of(source, fields, **options):
    readers = {name: field.build() for name, field in fields.items()}
    shape = options.pop("shape", ClipShape(9, 32, 32))
    return dataset_of(source.records, shape=shape, fields=readers, max_upscale=4, **options)


def write_set(root):
    """Two seconds at 30 frames a second, with a field of each kind."""
    make_folder(root, ["a"], num_frames=FRAMES, height=64, width=72)
    write_numbered(root / "control/a.mkv", num_frames=FRAMES // 2, rate=15, height=32, width=36)
    for i in range(2):
        write_numbered(root / f"lost/a_{i}.mp4", num_frames=FRAMES, height=64, width=72)
    (root / "inside").mkdir()
    half = np.zeros((64, 72), np.uint8)
    half[:, :36] = 255
    Image.fromarray(half).save(root / "inside/a.png")
    (root / "reference").mkdir()
    Image.new("RGB", (80, 40), (250, 10, 20)).save(root / "reference/a.png")
    for name in ("camera", "seconds", "audio", "scene"):
        (root / name).mkdir()
    np.save(root / "camera/a.npy", [[100 + i, 200, 36, 32] for i in range(FRAMES)])
    (root / "seconds/a.json").write_text(json.dumps([[i / 10] for i in range(20)]))
    np.savez_compressed(root / "audio/a.npz", wave=np.arange(6, dtype=np.int16).reshape(2, 3))
    (root / "scene/a.txt").write_text("a quiet\nroom\n")
    (root / "only.jsonl").write_text(json.dumps({"video": "videos/a.mp4", "caption": "a"}))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


def test_each_kind_gives_its_tensor_of_the_clips_window(folder):
    fields = fields_of(KINDS)
    dataset = samples_of(read_source(folder, SourceOptions(fields=fields)), fields)
    for index in range(4):
        sample = dataset[index].sample
        values, frames = sample.fields, [round(moment * 30) for moment in sample.times]
        assert numbers_of(sample.video_tchw) == frames
        assert {name: getattr(value, "shape", value) for name, value in values.items()} == {
            "control": (9, 3, 32, 32),
            "inside": (9, 1, 32, 32),
            "reference": (3, 32, 32),
            "lost": (2, 9, 3, 32, 32),
            "camera": (9, 4),
            "seconds": (9, 1),
            "audio": (2, 3),
            "scene": "a quiet room",
        }
        shown = numbers_of(values["control"])
        assert (
            max(abs(n / 15 - moment) for n, moment in zip(shown, sample.times, strict=True)) <= 1 / 30 + 1e-6
        )
        assert [numbers_of(video) for video in values["lost"]] == [frames, frames]
        assert values["inside"][0, 0].tolist() == [[1] * 16 + [0] * 16] * 32
        assert values["reference"][:, 9, 9].tolist() == [250, 10, 20]
        assert values["camera"].tolist() == [[(100 + n) / 2, 100, 36 / 2 - 2, 16] for n in frames]
        assert [round(x * 10) for x in values["seconds"].flatten().tolist()] == pytest.approx(
            [moment * 10 for moment in sample.times], abs=0.5 + 1e-6
        )
        assert values["audio"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert values["audio"].dtype == values["camera"].dtype == torch.float32


ROW = {
    "video": "videos/a.mp4",
    "caption": "clip a",
    "control": "control/a.mkv",
    "inside": "inside/a.png",
    "reference": "reference/a.png",
    "lost": ["lost/a_0.mp4", "lost/a_1.mp4"],
    "camera": "camera/a.npy",
    "seconds": [[i / 10] for i in range(20)],
    "scene": "a quiet room",
}


def as_folder(root):
    return root


def as_manifest(root):
    """Everything in columns, but for `audio`, which lies next to videos/."""
    (root / "clips.jsonl").write_text(json.dumps(ROW))
    return root / "clips.jsonl"


def as_table(root):
    """A CSV file has texts only: lists stand in it as JSON."""
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in ROW.items()}
    with (root / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    return root / "clips.csv"


def as_lists(root):
    (root / "videos.txt").write_text("videos/a.mp4\n")
    (root / "prompt.txt").write_text("clip a\n")
    (root / "control.txt").write_text("control/a.mkv\n")
    (root / "scene.txt").write_text("a quiet room\n")
    shutil.rmtree(root / "labels")
    shutil.rmtree(root / "scene")
    return root


def files_in(root, name):
    """Returns the files of the clip in one folder."""
    return sorted((root / name).glob("a*"))


def as_archive(root):
    with tarfile.open(root / "set.tar", "w") as archive:
        for name in KINDS:
            for file in files_in(root, name):
                number = file.stem.removeprefix("a")
                archive.add(file, f"a.{name}{number}{file.suffix}")
        archive.add(root / "videos/a.mp4", "a.mp4")
        archive.add(root / "labels/a.txt", "a.txt")
    return root / "set.tar"


def as_arrow(root):
    """Files stand in the dataset as bytes, with and without a name."""
    pa = pytest.importorskip("pyarrow")
    row = {"video": "videos/a.mp4", "caption": "clip a", "scene": "a quiet room", "lost": ROW["lost"]}
    row = {name: [value] for name, value in row.items()}
    for name in ("control", "inside", "reference", "camera", "seconds", "audio"):
        file = files_in(root, name)[0]
        content = file.read_bytes()
        row[name] = [content if name == "audio" else {"bytes": content, "path": file.name}]
    table = pa.table(row)
    with pa.OSFile(str(root / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (root / "dataset_info.json").write_text("{}")
    return root


@pytest.mark.parametrize("lay_out", [as_folder, as_manifest, as_table, as_lists, as_archive, as_arrow])
def test_fields_are_found_in_every_kind_of_source(folder, tmp_path, lay_out):
    fields = fields_of(KINDS)
    expected = samples_of(read_source(folder, SourceOptions(fields=fields)), fields)[3].sample
    root = shutil.copytree(folder, tmp_path / "set")
    source = read_source(lay_out(root), SourceOptions(fields=fields))
    assert not [note for note in source.notes if "not used" in note or "no clip" in note]
    sample = samples_of(source, fields)[3].sample
    assert sample.times == expected.times
    for name, value in expected.fields.items():
        same = sample.fields[name] == value
        assert same if isinstance(same, bool) else same.all(), name


def test_a_missing_field_is_named_with_clip_row_and_place(tmp_path):
    root = make_folder(tmp_path / "set", ["a", "b"], num_frames=2)
    write_numbered(root / "control/a.mp4", num_frames=2)
    fields = fields_of({"control": {"kind": "video"}})
    where = rf"b\.mp4: field `control`: there is no {root}/control/b\.\* \(video image\)"
    with pytest.raises(DataError, match=rf"1 of 2 clips have no usable name, caption and fields:\n.*{where}"):
        read_source(root, SourceOptions(fields=fields))
    source = read_source(root, SourceOptions(fields=fields, max_bad_fraction=0.5))
    assert [record.clip_id for record in source.records] == ["videos/a.mp4"]
    assert "videos/b.mp4 (field `control`" in source.left_out()
    table = root / "clips.jsonl"
    table.write_text(json.dumps({"video": "b.mp4", "caption": "b", "scene": 3}))
    with pytest.raises(DataError, match=r"clips\.jsonl:1: field `control`: there is no column `control`"):
        read_source(table, SourceOptions(fields=fields))
    with pytest.raises(DataError, match=r"clips\.jsonl:1: field `scene`: it is not a text"):
        read_source(table, SourceOptions(fields=fields_of({"scene": {"kind": "text"}})))
    write_numbered(root / "losers/b_1.mp4", num_frames=2)
    source = read_source(root)
    assert [record.clip_id for record in source.records] == ["videos/a.mp4", "videos/b.mp4"]
    said = (
        "1 videos in {0}/ have the names of clips in videos/ and no captions, and are no clips: to use them, "
    )
    declare = "declare data.fields.{0}"
    assert source.notes[:2] == tuple((said + declare).format(name) for name in ("control", "losers"))
    write_numbered(root / "control/z.mp4", num_frames=2)
    with pytest.raises(
        DataError, match=r"Folders next to videos/ \(control, losers\) hold fields if data.fields"
    ):
        read_source(root)


def test_files_of_fields_are_neither_clips_nor_lost_silently(tmp_path):
    root = make_folder(tmp_path / "set", ["a"], num_frames=2)
    for name in "az":
        write_numbered(root / f"edges/{name}.mp4", num_frames=2)
    fields = fields_of({"control": {"kind": "video", "column": "edges"}})
    source = read_source(root, SourceOptions(fields=fields))
    assert [record.clip_id for record in source.records] == ["videos/a.mp4"]
    assert source.notes == ("1 files in the folders of fields belong to no clip: edges/z.mp4",)


def spoilt(root, name):
    """Replaces the field of clip b by one that does not fit it; returns what is said."""
    place = root / name
    if name == "control":
        write_numbered(place / "b.mkv", num_frames=5, rate=15, height=32, width=36)
        return (
            r"mismatch: its field `control` \(b\.mkv\): it ends after 0\.33 s, the frames shown are at up to"
        )
    if name == "inside":
        Image.new("L", (64, 64)).save(place / "b.png")
        return r"mismatch: its field `inside` .*64x64 \(height x width\) has not the aspect ratio .* 64x72"
    if name == "reference":
        (place / "b.png").write_bytes(b"no picture")
        return r"unreadable: its field `reference` \(b\.png\)"
    if name == "camera":
        np.save(place / "b.npy", np.zeros((3, 4)))
        return r"mismatch: its field `camera` \(b\.npy\): it has 3 rows, the last frame shown needs"
    (place / "b.json").unlink()
    return r"missing: its field `seconds` \(b\.json\): No such file"


@pytest.mark.parametrize("name", ["control", "inside", "reference", "camera", "seconds"])
def test_a_clip_whose_field_does_not_fit_is_replaced_and_counted(folder, tmp_path, name):
    root = shutil.copytree(folder, tmp_path / "set")
    for file in [*root.rglob("a.*"), *root.rglob("a_*.mp4")]:
        shutil.copy(file, file.with_name(f"b{file.name[1:]}"))
    fields = fields_of(KINDS)
    source = read_source(root, SourceOptions(fields=fields))
    says = spoilt(root, name)
    dataset = samples_of(source, fields, shuffle=False, window="center")
    result = dataset[1]
    assert result.sample.clip_id == "videos/a.mp4"
    (failure,) = result.failures
    assert failure.clip_id == "videos/b.mp4"
    assert re.match(says, f"{failure.cause}: {failure.detail}")


def header(dtype: str, length: object) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},)}}"


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def zipped(*names, size=8) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, npy(header("<f4", "2"), bytes(size)))
    return raw.getvalue()


HOSTILE = {
    "pickle.npy": (pickle.dumps([print]), "its header is damaged"),
    "objects.npy": (
        npy(header("|O", "1"), b"cos\nsystem\n"),
        "holds object",
    ),
    "huge.npy": (
        npy(header("<f8", "1 << 40")),
        "its header is damaged",
    ),
    "long.npy": (
        npy(header("<f8", "99999999999")),
        "its header promises",
    ),
    "less.npy": (npy(header("<f8", "-1")), "its header promises"),
    "words.npy": (npy(header("<U1", "1"), b"abcd"), "not numbers"),
    "code.npy": (npy("__import__('os').system('true')"), "its header is damaged"),
    "two.npz": (zipped("x.npy", "y.npy"), "it holds x, y: choose one with `entry`"),
    "bomb.npz": (lambda: zipped("x.npy", size=300 << 20), r"too large.*`x\.npy` has"),
    "none.npz": (b"PK\x03\x04", r"it is no \.npz file"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "nested.json": (b"[" * 20 + b"1" + b"]" * 20, "nested more than 8 deep"),
    "ragged.json": (b"[[1, 2], [3]]", "different lengths"),
    "later.json": (b"[[1, 2], [3, [4]]]", "different lengths"),
    "words.json": (b'["a", "b"]', "other things than numbers"),
    "null.json": (b"[null, 1]", "other things than numbers"),
    "nan.json": (b"[NaN, 1]", "not finite"),
    "whole.json": (b"[1" + b"0" * 400 + b"]", "other things than numbers"),
    "empty.json": (b"[]", "it is empty"),
    "words.txt": (b"1 2\n3 x\n", "a row of numbers in each line"),
    "lines.txt": (b"1 2\n3\n", "different numbers of numbers"),
    "bytes.txt": (b"\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_numbers_of_strangers_are_refused_by_name(tmp_path, name):
    content, says = HOSTILE[name]
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    with pytest.raises(BadClip, match=says):
        read_numbers(FieldFile(tmp_path / name, suffix=(tmp_path / name).suffix), None)


def test_a_file_of_numbers_has_a_limited_size_and_is_no_pipe(tmp_path):
    with (tmp_path / "sparse.npy").open("wb") as file:
        file.truncate(20 << 30)
    os.mkfifo(tmp_path / "pipe.npy")
    for name, says in {
        "sparse": "too large: it has 21,474,836,480 bytes",
        "pipe": "not a regular",
    }.items():
        with pytest.raises(BadClip, match=says):
            read_numbers(FieldFile(tmp_path / f"{name}.npy", suffix=".npy"), None)


def test_a_field_that_begins_with_its_part_of_the_file_is_read_from_there(folder, tmp_path):
    """One long file with two parts: each part has a control video and rows of its own."""
    root = shutil.copytree(folder, tmp_path / "set")
    write_numbered(root / "part.mp4", num_frames=30, rate=30, height=64, width=72)
    row = {
        **ROW,
        "start": 1.0,
        "end": 2.0,
        "control": "part.mp4",
        "camera": [[i, 1, 0, 0] for i in range(30)],
    }
    (root / "clips.jsonl").write_text(json.dumps(row))
    kinds = {name: {**KINDS[name], "begins": "part"} for name in ("control", "camera")}
    fields = fields_of({**kinds, "lost": KINDS["lost"]})
    source = read_source(root / "clips.jsonl", SourceOptions(fields=fields))
    for window in ("head", "random"):
        sample = samples_of(source, fields, window=window, shape=ClipShape(5, 32, 32))[2].sample
        frames = numbers_of(sample.video_tchw)
        assert numbers_of(sample.fields["control"]) == [frame - 30 for frame in frames]
        assert sample.fields["camera"][:, 0].tolist() == [(frame - 30) / 2 for frame in frames]
        assert numbers_of(sample.fields["lost"][0]) == frames


def test_one_time_limit_holds_for_a_clip_with_all_its_fields(folder, monkeypatch):
    """Once the clip has used it up, its fields have none left."""
    fields = fields_of({"control": KINDS["control"]})
    dataset = samples_of(
        read_source(folder / "only.jsonl", SourceOptions(fields=fields)), fields, timeout_s=60
    )
    assert dataset[0].failures == ()
    read = FrameReader.read

    def slow(reader, *args, **kwargs):
        frames = read(reader, *args, **kwargs)
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        return frames

    now = time.monotonic()
    monkeypatch.setattr(FrameReader, "read", slow)
    with pytest.raises(
        DataError, match=r"timeout: its field `control` \(a\.mkv\): decoding takes longer than"
    ):
        dataset[0]


def test_workers_hand_over_fields(folder):
    fields = fields_of(KINDS)
    dataset = samples_of(read_source(folder, SourceOptions(fields=fields)), fields)
    failures = FailureLog(num_clips=1, max_bad_fraction=0)
    loader = VideoLoader(dataset=dataset, batches=OrderedBatches([2]), failures=failures, num_workers=1)
    try:
        batch = next(loader)
    finally:
        loader.close()
    for index, sample in enumerate(batch.samples):
        for name, value in dataset[index].sample.fields.items():
            same = sample.fields[name] == value
            assert same if isinstance(same, bool) else same.all(), name


def test_the_key_of_a_field_changes_with_what_its_value_depends_on(folder, tmp_path):
    """A text has the same key in every window, a video another one; a changed file changes its own alone."""
    root = shutil.copytree(folder, tmp_path / "set")

    def keys(index=0, kinds=KINDS, **options):
        fields = fields_of(kinds)
        readers = {name: field.build() for name, field in fields.items()}
        records = read_source(root, SourceOptions(fields=fields)).records
        options = {"fields": readers, "window": "uniform", **options}
        dataset = open_dataset(tmp_path / "cache", records, **options)
        facts = SampleFacts(dataset.videos, dataset.cache, index, dataset.videos.order.clip_ref(index))
        return {name: facts.field(name) for name in readers}

    def changed(after):
        return {name for name in first if first[name] != after[name]}

    first = keys()
    assert len(set(first.values())) == len(KINDS)
    assert not changed(keys())
    timed, still = {"control", "inside", "lost", "camera", "seconds"}, {"reference", "audio"}
    assert changed(keys(index=1)) == timed
    assert changed(keys(video_size=(24, 32))) == timed | still
    assert changed(keys(kinds={**KINDS, "inside": {"kind": "mask", "threshold": 9}})) == {"inside"}
    np.save(root / "camera/a.npy", np.ones((FRAMES, 4)))
    assert changed(keys()) == {"camera"}
    (root / "scene/a.txt").write_text("a loud room")
    assert changed(keys()) == {"camera", "scene"}
    (root / "control/a.mkv").unlink()
    write_numbered(root / "control/a.mp4", num_frames=FRAMES, rate=30, height=32, width=36)
    assert changed(keys()) == {"camera", "scene", "control"}


def test_the_fingerprint_of_a_source_covers_its_fields(tmp_path):
    root = make_folder(tmp_path / "set", ["a"], num_frames=2)
    (root / "camera").mkdir()
    np.save(root / "camera/a.npy", np.ones((2, 4)))
    options = SourceOptions(fields=fields_of({"camera": KINDS["camera"]}))
    without, first = read_source(root), read_source(root, options)
    np.save(root / "camera/a.npy", np.ones((3, 4)))
    assert len({without.fingerprint, first.fingerprint, read_source(root, options).fingerprint}) == 3
    assert read_source(root).fingerprint == without.fingerprint


def test_inspect_and_preview_show_fields(folder, tmp_path, capsys):
    root = shutil.copytree(folder, tmp_path / "set")
    for name in ("videos/a.mp4", "labels/a.txt", "control/a.mkv", "inside/a.png", "scene/a.txt"):
        path = root / name
        shutil.copy(path, path.with_name(f"b{path.suffix}"))
    write_numbered(root / "control/b.mkv", num_frames=5, rate=15, height=32, width=36)
    kinds = {name: KINDS[name] for name in ("control", "inside", "scene")}
    words = ["--base", "configs/sft.yaml", f"args.train_data=[{root}]", "data.params.video_size=[32,32]"]
    words += ["data.params.max_num_frames=9", "data.max_bad_fraction=1", "data.params.max_upscale=4"]
    words += [f"data.fields.{name}.kind={kind['kind']}" for name, kind in kinds.items()]
    assert main(["data", "inspect", *words, "--output", str(tmp_path / "report")]) == 0
    said = dict(
        line.split(maxsplit=2)[1:]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("field")
    )
    assert said["inside"] == "mask: 64x72, one image (2)"
    assert said["scene"] == "text: a text (2)"
    assert said["control"].startswith(
        "video: 32x36 at 15 (2); 1 clips fail for it: videos/b.mp4 (mismatch: its"
    )
    assert main(["data", "preview", *words, "--output", str(tmp_path), "--count", "2"]) == 0
    assert capsys.readouterr().out.count(".mp4  9x32x32  set/videos/a.mp4") == 2
    with av.open(str(tmp_path / "0000.mp4")) as container:
        assert container.streams.video[0].width == 3 * 32 + 2 * 2
    assert Image.open(tmp_path / "contact_sheet.png").height == 2 * 3 * (16 + 32 + 2 * 2)


def test_a_kind_from_outside_is_read_like_the_others(folder, tmp_path):
    """The kind of `docs/extend.md` reads the mask of the set as two classes."""
    write_extensions(tmp_path)
    load_extensions(["--extension", str(tmp_path / "labels")])
    try:
        fields = fields_of({"inside": {"kind": "labels", "step": 51}})
        source = read_source(folder / "only.jsonl", SourceOptions(fields=fields))
        sample = samples_of(source, fields)[0].sample
        assert sample.fields["inside"][0, 0].tolist() == [[5] * 16 + [0] * 16] * 32
    finally:
        load_extensions([])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("kind=vidoe", r"data\.fields\.a\.kind = vidoe: .*did you mean 'video'"),
        ("kind=mask treshold=3", r"a\.treshold = 3: expected a setting of mask: .*did you mean 'threshold'"),
        ("kind=video space=points", r"a\.space = points: expected a setting of video: kind, column, begins"),
        ("kind=mask threshold=256", r"a\.threshold = 256: expected a whole number >= 1 and <= 255"),
        ("column=x", r"a\.kind: expected one of array, .*, but it is missing"),
    ],
)
def test_settings_stand_next_to_the_kind_and_are_checked_by_it(words, says):
    with pytest.raises(ConfigError, match=says):
        load_field(words)


def test_another_kind_keeps_the_settings_that_it_has_too():
    assert load_field("kind=mask column=m threshold=9 kind=video") == {
        "kind": "video",
        "column": "m",
        "begins": "file",
    }


def load_field(words: str):
    paths = [f"data.fields.a.{word}" for word in words.split()]
    config = load_run_config(["configs/sft.yaml"], paths, purpose="check", check_paths=False)
    return config.data.fields["a"].model_dump()
