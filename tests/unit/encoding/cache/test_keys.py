"""A wrong hit is impossible: what differs in anything that an encoding depends on has another key."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import Span, read_stamp
from sat_train.encoding.cache import key as key_module
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.key import EncoderDigests
from tests.unit.data.videos import record_of, write_numbered
from tests.unit.encoding.cache.samples import ENCODERS, keys_of, open_dataset


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "a" / "0001.mp4"
    write_numbered(path, num_frames=90)
    return path


@pytest.fixture
def base(tmp_path, clip):
    return keys_of(open_dataset(tmp_path, [record_of(clip)], image="noised"))


OTHER = {
    "another fps": {"shape": {"fps": 6}},
    "another number of frames": {"max_num_frames": 9},
    "another size": {"video_size": (16, 32)},
    "another window": {"window": "center"},
    "frames left out": {"skip_frms_num": 3},
    "another limit of enlargement": {"shape": {"max_upscale": 3.0}},
    "another autoencoder": {"encoder_digests": EncoderDigests("other", ENCODERS.text)},
    "another identity": {"identity": "stat"},
}


@pytest.mark.parametrize("what", OTHER)
def test_other_settings_have_other_keys(tmp_path, clip, base, what):
    other = keys_of(open_dataset(tmp_path, [record_of(clip)], image="noised", **OTHER[what]))
    assert other.clip != base.clip
    assert other.image != base.image
    assert other.text == base.text


def test_a_part_of_a_clip_has_its_own_key(tmp_path, clip, base):
    assert keys_of(open_dataset(tmp_path, [record_of(clip, start=1.0)])).clip != base.clip


def test_two_clips_of_one_name_in_two_folders(tmp_path, clip, base):
    other = tmp_path / "b" / "0001.mp4"
    write_numbered(other, num_frames=90, gop=7)
    assert keys_of(open_dataset(tmp_path, [record_of(other)])).clip != base.clip


def test_one_clip_under_two_names_is_one_entry(tmp_path, clip, base):
    other = tmp_path / "b" / "renamed.mp4"
    other.parent.mkdir()
    shutil.copy(clip, other)
    assert keys_of(open_dataset(tmp_path, [record_of(other)])).clip == base.clip
    by_stat = [keys_of(open_dataset(tmp_path, [record_of(path)], identity="stat")) for path in (clip, other)]
    assert by_stat[0].clip != by_stat[1].clip


@pytest.mark.parametrize("restored_times", [False, True])
def test_an_edited_clip_misses_even_with_its_size_and_time_put_back(tmp_path, clip, restored_times):
    path = tmp_path / "clip.mp4"
    shutil.copy(clip, path)
    dataset = open_dataset(tmp_path, [record_of(path)])
    before, status = keys_of(dataset), path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if restored_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert keys_of(dataset).clip != before.clip
    assert keys_of(open_dataset(tmp_path, [record_of(path)])).clip != before.clip


def test_a_changed_caption_changes_the_text_alone(tmp_path, clip, base):
    changed = keys_of(
        open_dataset(tmp_path, [replace(record_of(clip), captions=("another caption",))], image="noised")
    )
    assert (changed.clip, changed.image) == (base.clip, base.image)
    assert changed.text != base.text
    other_t5 = EncoderDigests(ENCODERS.vae, "other")
    assert keys_of(open_dataset(tmp_path, [record_of(clip)], encoder_digests=other_t5)).text != base.text


def test_older_code_misses(tmp_path, clip, base, monkeypatch):
    monkeypatch.setattr(key_module, "CODE_VERSION", key_module.CODE_VERSION + 1)
    newer = keys_of(open_dataset(tmp_path, [record_of(clip)], image="noised"))
    assert not {newer.clip, newer.text, newer.image} & {base.clip, base.text, base.image}


def test_the_noise_on_the_first_frame_is_part_of_its_key_alone(tmp_path, clip):
    noised = open_dataset(tmp_path, [record_of(clip)], image="noised")
    plain = open_dataset(tmp_path, [record_of(clip)], image="plain")
    assert keys_of(noised, 0).clip == keys_of(noised, 1).clip == keys_of(plain, 5).clip
    assert keys_of(noised, 0).image != keys_of(noised, 1).image
    assert keys_of(plain, 0).image == keys_of(plain, 1).image
    other_seed = open_dataset(tmp_path, [record_of(clip)], image="noised", seed=2)
    assert keys_of(other_seed, 0).image != keys_of(noised, 0).image
    other_level = open_dataset(tmp_path, [record_of(clip)], image="noised", noise_log_mean=-2.0)
    assert keys_of(other_level, 0).image not in (keys_of(noised, 0).image, keys_of(plain, 0).image)


def test_limited_views_repeat_and_are_the_same_in_every_run(tmp_path, clip):
    def keys(seed):
        dataset = open_dataset(
            tmp_path, [record_of(clip)], image="noised", window="random", views=3, seed=seed
        )
        return [(keys_of(dataset, index).clip, keys_of(dataset, index).image) for index in range(7)]

    first = keys(1)
    assert first == keys(2)
    assert first[:3] == first[3:6]
    assert len(set(first)) == 3


def test_limited_views_do_not_depend_on_names_or_on_other_clips(tmp_path, clip):
    """A renamed file or folder, a set of the same last name beside it, an archive that holds the file."""
    other, archive = tmp_path / "elsewhere" / "b.mp4", tmp_path / "a.tar"
    other.parent.mkdir()
    shutil.copyfile(clip, other)
    archive.write_bytes(b"head" + clip.read_bytes() + b"tail")
    record = record_of(clip)
    same = {
        "as it was": record,
        "its set has another name": replace(record, clip_id=f"other/{record.clip_id}"),
        "another file name": replace(record_of(other), clip_id="b.mp4"),
        "in an archive": replace(record, path=archive, span=Span(4, clip.stat().st_size), clip_id="x"),
    }
    by_name = {}
    for name, each in same.items():
        dataset = open_dataset(tmp_path / "cache", [each], image="noised", window="random", views=3)
        by_name[name] = [keys_of(dataset, index) for index in range(3)]
    assert len({keys.clip for keys in by_name["as it was"]}) == 3
    for keys in by_name.values():
        for each, as_it_was in zip(keys, by_name["as it was"], strict=True):
            assert (each.clip, each.image) == (as_it_was.clip, as_it_was.image)


def test_parts_of_a_file_and_files_of_other_lengths_have_views_of_their_own(tmp_path, clip):
    longer = tmp_path / "longer.mp4"
    write_numbered(longer, num_frames=91)
    records = [record_of(clip), replace(record_of(clip), start=0.5), record_of(longer)]
    dataset = open_dataset(tmp_path, records, views=2).videos
    views = [dataset.augmentation_key(index, dataset.order.clip_ref(index)) for index in range(6)]
    assert len({view.number for view in views}) == 6


def test_random_windows_without_a_limit_never_repeat(tmp_path, clip):
    dataset = open_dataset(tmp_path, [record_of(clip)], window="random")
    assert len({keys_of(dataset, index).clip for index in range(50)}) == 50


def test_an_image_of_its_own_conditions_by_its_contents(tmp_path, clip):
    from PIL import Image

    records = []
    for name, colour in (("a", "red"), ("b", "blue")):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (64, 64), colour).save(path)
        records.append(replace(record_of(clip), image=path))
    first, second = (keys_of(open_dataset(tmp_path, [record], image="plain")) for record in records)
    assert first.clip == second.clip
    assert first.image != second.image


def test_files_are_hashed_once_over_runs(tmp_path, clip, monkeypatch):
    os.utime(clip, ns=(1, 1))
    monkeypatch.setattr("sat_train.encoding.cache.file_metadata._RACY_NS", 0)
    file_metadata = FileMetadata(tmp_path)
    identity, info = file_metadata.origin(clip).identity, file_metadata.info(clip)
    assert file_metadata.recall_info(clip, None, read_stamp(clip), with_turn=True) is None
    file_metadata.publish()
    monkeypatch.setattr(
        "sat_train.encoding.cache.file_metadata._hash", lambda *_: pytest.fail("hashed again")
    )
    monkeypatch.setattr(
        "sat_train.encoding.cache.file_metadata.read_headers", lambda *_, **__: pytest.fail("opened again")
    )
    again = FileMetadata(tmp_path)
    assert (again.origin(clip).identity, again.info(clip)) == (identity, info)


def test_what_was_just_written_is_not_remembered(tmp_path, clip):
    """A second change within one tick of the file system's clock would leave no trace."""
    path = tmp_path / "clip.mp4"
    shutil.copyfile(clip, path)
    file_metadata = FileMetadata(tmp_path)
    file_metadata.origin(path)
    assert not file_metadata.learnt()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadClip, match="missing"):
        FileMetadata(tmp_path).origin(tmp_path / "nothing.mp4")
