"""A condition from the cache equals the encoded one bit for bit, and its key holds all that it depends on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sat_train.config import load_run_config
from sat_train.data.build import build_train_dataset
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.build import EncodingStage, build_encoding
from sat_train.encoding.encode import Encode, EncodeAndKeep
from sat_train.encoding.encoded_batch import EncodedSample
from sat_train.encoding.encoded_dataset import EncodedDataset, UnencodedSample
from tools.make_control_videos import write_sets

# set of clips, kind of each field, target and settings of the condition
KINDS = {
    "FramesInSlot": ("mosaic", {}, {"which": "random", "count": 2}),
    "ControlVideo": ("mosaic", {"control": "video"}, {}),
    "ControlPixels": ("mosaic", {"control": "video"}, {}),
    "Inpainting": ("mosaic", {"mask": "mask"}, {"grow": 9}),
    "ReferenceFrames": ("mosaic", {"reference": "image"}, {"position": "repeat_first"}),
    "Teacher": ("mosaic", {}, {}),
    "PlueckerCameras": ("camera", {"poses": "per_frame", "intrinsics": "per_frame"}, {}),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    write_sets(path, sets=("mosaic", "camera"), train=2, valid=1)
    return path


def open_stage(
    clips: Path, cache: Path, target: str, mode: str, *words: str
) -> tuple[EncodingStage, EncodedDataset]:
    """Returns the encoding stage of a run with one condition, and its training set."""
    name, fields, params = KINDS[target]
    settings = [f"data.fields.{field}.kind={kind}" for field, kind in fields.items()]
    settings += [f"model.conditions.own.params.{key}={value}" for key, value in params.items()]
    config = load_run_config(
        ["configs/model/cogvideox1.5_tiny_i2v.yaml", "configs/sft.yaml"],
        [
            *settings,
            *words,
            f"model.conditions.own.target={target}",
            "model.noised_image_dropout=0",
            f"args.train_data=[{clips}/{name}/train/manifest.jsonl]",
            f"data.cache_dir={cache}",
            "data.params.video_size=[32,32]",
            "data.params.max_num_frames=9",
        ],
        check_paths=False,
    )
    mesh = start_single_process()
    stage = build_encoding(config, mesh, mode)
    assert stage.cache is not None
    videos = build_train_dataset(config, mesh, headers=stage.cache.file_metadata)
    return stage, EncodedDataset(videos, stage.cache, stage.conditions)


def read(dataset: EncodedDataset, index: int) -> EncodedSample | UnencodedSample:
    return dataset.sample(index, dataset.videos.order.clip_ref(index))


def key_of(clips: Path, cache: Path, target: str, *words: str, index: int = 0) -> str:
    _, dataset = open_stage(clips, cache, target, "write", *words)
    return dataset.entries(index, dataset.videos.order.clip_ref(index))["own"].key


@pytest.mark.parametrize("target", sorted(KINDS.keys() - {"Teacher"}))
def test_cached_equals_encoded_bit_for_bit(clips, tmp_path, target):
    stage, dataset = open_stage(clips, tmp_path, target, "write")
    encode = stage.build_encode(start_single_process())
    assert isinstance(encode, EncodeAndKeep)
    samples = [read(dataset, index) for index in range(2)]
    for sample in samples:
        encode.sample(sample)
    encode.writer.publish()
    _, cached = open_stage(clips, tmp_path, target, "require")
    plain = Encode(stage.encoders, stage.conditions)
    for index, sample in enumerate(samples):
        there, fresh = read(cached, index), plain.sample(sample)
        assert isinstance(there, EncodedSample)
        assert there.encodings["own"].keys() == fresh.encodings["own"].keys()
        for name, tensor in fresh.encodings["own"].items():
            assert tensor.dtype == there.encodings["own"][name].dtype
            assert torch.equal(tensor, there.encodings["own"][name]), name


def test_another_file_of_the_field_is_another_encoding(clips, tmp_path):
    before = {target: key_of(clips, tmp_path, target) for target in ("ControlVideo", "Inpainting")}
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    for path in (other / "mosaic/train/control").iterdir():
        shutil.copy(clips / "mosaic/valid/control/0000.mp4", path)
    assert key_of(other, tmp_path, "ControlVideo") != before["ControlVideo"]
    assert key_of(other, tmp_path, "Inpainting") == before["Inpainting"], "it reads the mask alone"


def test_settings_change_the_key_and_captions_do_not(clips, tmp_path):
    before = key_of(clips, tmp_path, "ControlVideo")
    assert key_of(clips, tmp_path, "ControlVideo", "model.conditions.own.params.into=extras") != before
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    manifest = other / "mosaic/train/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"caption": "', '"caption": "not '))
    assert key_of(other, tmp_path, "ControlVideo") == before


@pytest.mark.parametrize(
    ("target", "differs"), [("FramesInSlot", True), ("ControlVideo", False), ("Inpainting", True)]
)
def test_only_what_draws_random_numbers_differs_from_view_to_view(clips, tmp_path, target, differs):
    words = ("data.params.window=head", "data.params.views=2")
    _, dataset = open_stage(clips, tmp_path, target, "write", *words)
    refs = [dataset.videos.order.clip_ref(index) for index in range(4)]
    keys = {}
    for index, ref in enumerate(refs):
        keys.setdefault(dataset.videos.record(ref).clip_id, set()).add(dataset.entries(index, ref)["own"].key)
    assert {len(each) for each in keys.values()} == {2 if differs else 1}


def test_clips_in_another_place_have_the_same_key(clips, tmp_path):
    other = tmp_path / "moved"
    shutil.copytree(clips, other)
    assert key_of(other, tmp_path, "PlueckerCameras") == key_of(clips, tmp_path, "PlueckerCameras")


TEACHER = '''
"""A frozen encoder of one's own."""

from sat_train.parts import ConditionParams, Field, WeightsFile, part


@part("condition", "Teacher", build=":build")
class TeacherParams(ConditionParams):
    """Features of a frozen encoder."""

    weights: WeightsFile = Field(description="Its weights.")


def build(params, model):
    from sat_train.extend import Condition

    class Teacher(Condition):
        tensors = frozenset({"features"})

    return Teacher(params, model)
'''


def test_the_content_of_weights_counts_and_not_their_path(clips, tmp_path):
    (tmp_path / "teacher.py").write_text(TEACHER)
    keys = []
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
        words = (
            "--extension",
            f"{tmp_path}/teacher.py",
            f"model.conditions.own.params.weights={tmp_path}/{name}",
        )
        keys.append(key_of(clips, tmp_path / "cache", "Teacher", *words))
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
