"""Which shape a clip's samples have, and that a set of many shapes is read as honestly as one of one."""

from __future__ import annotations

import itertools
import math

import pytest

from sat_train.config import load_run_config
from sat_train.config.shapes import ClipShape, allowed_shapes, size_of_aspect
from sat_train.data.batches import DataPosition
from sat_train.data.buckets import SampleSpec
from sat_train.data.build import build_train_loader, build_valid_loader
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.prepass import look_into
from sat_train.distributed.processes import start_single_process
from sat_train.errors import DataError
from tests.unit.data.videos import numbers_of, record_of, write_numbered

SHAPES = tuple(
    ClipShape(frames, *size)
    for frames in (49, 17, 1)
    for size in ((480, 720), (720, 480), (576, 576), (240, 352))
)


def choose(available, size, *, shapes=SHAPES, short_clip="skip", max_upscale=2.0):
    spec = SampleSpec(tuple(shapes), fps=8, short_clip=short_clip, max_upscale=max_upscale)
    return shapes[spec.choose_bucket(available, size)]


def test_a_clip_gives_as_many_frames_as_it_can():
    for available, frames in ((1, 1), (16, 1), (17, 17), (48, 17), (49, 49), (10_000, 49)):
        assert choose(available, (1080, 1920)).frames == frames
    with pytest.raises(BadClip, match="short: it gives 0 of 1 frames"):
        choose(0, (1080, 1920))
    with pytest.raises(BadClip, match="short: it gives 16 of 17 frames"):
        choose(16, (1080, 1920), shapes=SHAPES[:8])
    assert choose(16, (1080, 1920), shapes=SHAPES[:8], short_clip="pad").frames == 17


def test_the_size_is_the_one_nearest_in_aspect_that_needs_no_large_enlargement():
    """For pictures of every size and aspect, against the definition."""
    for height, width in itertools.product(range(100, 1300, 83), repeat=2):
        usable = [s for s in SHAPES[:4] if max(s.height / height, s.width / width) <= 2.0]
        if not usable:
            with pytest.raises(BadClip, match=r"too small: .*must be enlarged"):
                choose(49, (height, width))
            continue
        shape = choose(49, (height, width))
        assert shape in usable

        def distance(s, aspect=width / height):
            return abs(math.log(aspect * s.height / s.width))

        assert distance(shape) <= min(map(distance, usable)) + 0.03
        larger = [s for s in usable if s.height * s.width > shape.height * shape.width]
        assert all(distance(s) > min(map(distance, usable)) + 0.03 for s in larger)


def test_small_clips_take_the_small_size_of_their_aspect():
    assert choose(49, (1080, 1620)) == ClipShape(49, 480, 720)
    assert choose(49, (200, 300)) == ClipShape(49, 240, 352)
    assert choose(49, (1920, 1080)) == ClipShape(49, 720, 480)


@pytest.mark.parametrize("aspect", ["16:9", "9:16", "1:1", "4:3", "21:9", "3:2"])
@pytest.mark.parametrize("preset", ["cogvideox_5b", "cogvideox1.5_5b", "cogvideox_tiny"])
def test_sizes_of_aspects_fill_patches_and_cost_no_more(preset, aspect):
    words = [f"data.params.buckets.aspects=['{aspect}']"]
    config = load_run_config([f"configs/model/{preset}.yaml"], words, purpose="check", check_paths=False)
    base = config.data.params.video_size
    height, width = size_of_aspect(aspect, base, config.spec)
    assert height % 16 == width % 16 == 0
    assert height * width <= base[0] * base[1]
    ratio = int(aspect.split(":")[0]) / int(aspect.split(":")[1])
    if abs(math.log(ratio * base[0] / base[1])) <= 0.03:
        assert (height, width) == base
        return
    assert height <= math.sqrt(base[0] * base[1] / ratio) + 1e-6 < height + 16
    assert width <= math.sqrt(base[0] * base[1] * ratio) + 1e-6 < width + 16
    shapes = allowed_shapes(config.data.params, config.spec)
    tokens = [config.spec.tokens(config.spec.latent(*shape)) for shape in shapes]
    assert max(tokens) == tokens[0]


def test_tokens_are_those_of_the_published_models():
    for preset, tokens in (("cogvideox_5b", 17_550 + 226), ("cogvideox1.5_5b", 44_880 + 224)):
        config = load_run_config([f"configs/model/{preset}.yaml"], [], purpose="check", check_paths=False)
        (shape,) = allowed_shapes(config.data.params, config.spec)
        assert config.spec.tokens(config.spec.latent(*shape)) == tokens


def test_shrinking_keeps_to_lengths_that_fill_patches_as_the_trained_one_does():
    for preset, lengths in (
        ("cogvideox_tiny", (17, 13, 9, 5, 1)),
        ("cogvideox1.5_5b", (81, 73, 65, 57, 49, 41, 33, 25, 17, 9, 1)),
    ):
        config = load_run_config(
            [f"configs/model/{preset}.yaml"],
            ["data.params.short_clip=shrink"],
            purpose="check",
            check_paths=False,
        )
        assert tuple(shape.frames for shape in allowed_shapes(config.data.params, config.spec)) == lengths


# A set of clips of many shapes, read through loaders as a configuration describes them.


@pytest.fixture(scope="module")
def mesh():
    return start_single_process()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide, high and square clips, long and short, one on its side, one too small, one broken."""
    root = tmp_path_factory.mktemp("many") / "set"
    sizes = {"wide": (32, 64), "high": (64, 32), "square": (32, 32)}
    for name, (height, width) in sizes.items():
        for number in range(4):
            write_numbered(root / "videos" / f"{name}{number}.mp4", num_frames=60, height=height, width=width)
    write_numbered(root / "videos" / "brief0.mp4", num_frames=30, height=32, width=64)
    write_numbered(root / "videos" / "brief1.mp4", num_frames=30, height=32, width=64)
    write_numbered(root / "videos" / "turned.mp4", num_frames=60, height=32, width=64, rotation=90)
    write_numbered(root / "videos" / "small.mp4", num_frames=60, side=8)
    write_numbered(root / "videos" / "blink.mp4", num_frames=3, side=32)
    (root / "videos" / "broken.mp4").write_bytes(b"x" * 999)
    (root / "labels").mkdir()
    for path in (root / "videos").iterdir():
        (root / "labels" / f"{path.stem}.txt").write_text(path.stem)
    return root


BUCKETS = "{sizes: [[64,32],[32,32]], frames: [5]}"


def load_config(folder, *words, buckets=BUCKETS):
    fixed = ["data.params.video_size=[32,64]", "data.params.max_num_frames=13", "data.params.fps=8"]
    fixed += ["args.train_iters=1", "args.num_workers=0", "args.batch_size=2", "data.max_bad_fraction=0.1"]
    fixed += ["data.params.short_clip=skip", f"args.train_data=[{folder}]", f"data.params.buckets={buckets}"]
    return load_run_config([], [*fixed, *words], purpose="train", check_paths=False)


def shapes_of(loader, micro_steps):
    """Returns the shape in which each clip was seen."""
    seen = {}
    for _ in range(micro_steps):
        batch = next(loader)
        frames, _, height, width = batch.samples[0].video_tchw.shape
        shape = (frames, height, width)
        for clip in batch.clip_ids:
            seen.setdefault(clip.removeprefix("set/videos/"), set()).add(shape)
    return seen


def test_each_clip_is_seen_in_its_own_shape(mesh, folder, caplog, tmp_path):
    with caplog.at_level("INFO", logger="sat_train"):
        loader = build_train_loader(load_config(folder), mesh, run_directory=tmp_path)
    seen = shapes_of(loader, 30)
    expected = {f"wide{i}.mp4": {(13, 32, 64)} for i in range(4)}
    expected |= {f"high{i}.mp4": {(13, 64, 32)} for i in range(4)} | {"turned.mp4": {(13, 64, 32)}}
    expected |= {f"square{i}.mp4": {(13, 32, 32)} for i in range(4)}
    expected |= {f"brief{i}.mp4": {(5, 32, 64)} for i in range(2)}
    assert seen == expected
    assert set(loader.failures.by_clip) == {"set/videos/broken.mp4"}
    for line in (
        "13x64x32",
        "6 clips, 2 in a micro-batch",
        "1 clips are left out (too small): set/videos/small",
    ):
        assert line in caplog.text
    left_out = (tmp_path / "quarantine.jsonl").read_text()
    assert left_out.count('"sample_index": null') == 2
    assert "blink.mp4" in left_out


def test_frames_of_every_bucket_keep_the_wanted_pace(mesh, folder):
    loader = build_train_loader(load_config(folder), mesh)
    for index in range(20):
        sample = loader.dataset[index].sample
        if sample.clip_id.endswith("turned.mp4"):  # its numbers are on their side
            continue
        assert numbers_of(sample.video_tchw) == [round(time * 30) for time in sample.times]
        late = [time - i / 8 for i, time in enumerate(sample.times)]
        assert max(late) - min(late) <= 1 / 30 + 1e-6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_each_sample_once_and_a_run_resumes_in_its_middle(mesh, folder, workers):
    config = load_config(folder, f"args.num_workers={workers}")
    straight = build_train_loader(config, mesh)
    whole = [next(straight).sample_indices for _ in range(20)]
    taken = sorted(index for batch in whole for index in batch)
    position = straight.position
    assert taken == sorted(set(range(position.next)) - set(position.waiting))
    straight.close()
    before = build_train_loader(config, mesh)
    first = [next(before).sample_indices for _ in range(7)]
    stopped = before.position
    before.close()
    after = build_train_loader(config, mesh, start=DataPosition(stopped.next, stopped.waiting))
    assert first + [next(after).sample_indices for _ in range(13)] == whole
    after.close()


def test_a_budget_of_tokens_gives_small_shapes_large_batches(mesh, folder):
    buckets = "{sizes: [[64,32],[32,32]], frames: [5], max_tokens: 100}"
    config = load_config(folder, buckets=buckets)
    loader = build_train_loader(config, mesh)
    sizes = set()
    for _ in range(30):
        batch = next(loader)
        frames, _, height, width = batch.samples[0].video_tchw.shape
        tokens = config.spec.tokens(config.spec.latent(frames, height, width))
        sizes.add(len(batch.samples))
        assert len(batch.samples) * tokens <= 100 < (len(batch.samples) + 1) * tokens
    assert len(sizes) > 1


def test_validation_sees_each_clip_once_in_its_own_shape(mesh, folder, caplog):
    config = load_config(
        folder, f"args.valid_data=[{folder}]", "args.eval_iters=50", "args.eval_batch_size=3"
    )
    with caplog.at_level("INFO", logger="sat_train"):
        loader = build_valid_loader(config, mesh)
    assert "6 clips, 3 in a micro-batch" in caplog.text
    for _ in range(2):
        seen = [index for batch in loader for index in batch.sample_indices]
        assert sorted(index for index in seen if index < loader.num_samples) == list(range(16))
        assert len(seen) == len(set(seen))


def test_clips_too_short_for_every_bucket_are_named_before_the_first_sample(mesh, folder):
    with pytest.raises(
        DataError, match=r"1 of 18 clips are too short:\n    set/videos/blink.mp4: it gives 1 of 5"
    ):
        build_train_loader(load_config(folder, "data.params.short_clip=error"), mesh)


def test_padding_is_counted(mesh, folder, caplog):
    with caplog.at_level("INFO", logger="sat_train"):
        loader = build_train_loader(load_config(folder, "data.params.short_clip=pad"), mesh)
    assert "1 clips are padded: their last frame is repeated" in caplog.text
    assert shapes_of(loader, 40)["blink.mp4"] == {(5, 32, 32)}


def test_shrinking_batches_clips_of_one_length(mesh, folder, caplog):
    config = load_config(folder, "data.params.short_clip=shrink", "data.max_bad_fraction=1", buckets="null")
    with caplog.at_level("INFO", logger="sat_train"):
        loader = build_train_loader(config, mesh)
    seen = shapes_of(loader, 40)
    assert seen["brief0.mp4"] == {(5, 32, 64)}
    assert seen["wide0.mp4"] == {(13, 32, 64)}


def test_the_only_clip_of_a_bucket_is_replaced_by_one_of_another_in_its_shape(mesh, folder, tmp_path):
    """Its batch needs its shape: a clip of another bucket is cut to it."""
    for number in range(4):
        write_numbered(tmp_path / "set/videos" / f"wide{number}.mp4", num_frames=60, height=32, width=64)
        (tmp_path / "set/videos" / f"wide{number}.txt").write_text("x")
    path = tmp_path / "set/videos" / "high.mp4"
    write_numbered(path, num_frames=60, height=64, width=32, index_first=True)
    path.with_suffix(".txt").write_text("x")
    data = bytearray(path.read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle:] = bytes(len(data) - middle)  # the index is in front and stays
    path.write_bytes(data)
    config = load_config(
        tmp_path / "set", "args.batch_size=1", "data.params.max_upscale=4", "data.max_bad_fraction=1"
    )
    loader = build_train_loader(config, mesh)
    seen = {tuple(next(loader).samples[0].video_tchw.shape[2:]) for _ in range(10)}
    assert seen == {(32, 64), (64, 32)}
    assert [failure.cause for failure in loader.failures.by_clip.values()] == ["damaged"]


def test_a_turned_picture_counts_as_it_is_shown(tmp_path):
    write_numbered(tmp_path / "a.mp4", num_frames=5, height=32, width=64, rotation=270)
    record = record_of(tmp_path / "a.mp4")
    assert look_into(record).shown_size == (32, 64)
    assert look_into(record, with_turn=True).shown_size == (64, 32)


def test_mixtures_keep_their_shares(mesh, folder, tmp_path):
    """Of the samples that are taken or wait, three quarters are of the first set."""
    other = tmp_path / "other"
    for number in range(3):
        write_numbered(other / "videos" / f"{number}.mp4", num_frames=60, height=64, width=32)
        (other / "videos" / f"{number}.txt").write_text("x")
    loader = build_train_loader(load_config(f"{folder},{other}", "args.train_data_weights=[3,1]"), mesh)
    position = loader.position
    for micro in itertools.islice(loader.batches.micro_batches(position), 600):
        shapes = {loader.dataset.shape(index) for index in micro.indices}
        assert len(shapes) == 1
        position = micro.after
    sources = [loader.dataset.order.clip_ref(index).source for index in range(position.next)]
    assert sources[:1000].count(0) == 750
