"""Fields of samples: where they are found, what each kind gives, and what is said where one is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sat_train.config.parts.field_parts import FieldConfig
from sat_train.config.shapes import ClipShape
from sat_train.data.sources.read import read_source
from sat_train.data.sources.records import SourceOptions
from tests.unit.data.videos import dataset_of, make_folder, numbers_of, write_numbered

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
