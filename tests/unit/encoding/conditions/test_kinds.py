"""The built-in conditions: what each encodes of a sample, and what the network receives of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from sat_train.config import load_run_config
from sat_train.config.parts.condition_parts import ConditionConfig
from sat_train.data.batches import VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.encoding.build import build_conditions, build_encoders
from sat_train.encoding.conditions.cameras import pluecker_rays
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.latent_time import to_latent_frames
from sat_train.encoding.conditions.randomness import SampleRandomness
from sat_train.encoding.encoded_batch import stack_rows
from sat_train.errors import SatTrainError

FRAMES, SIDE = 9, 32  # three latent frames, which 1.5 pads to four
MODELS = ("cogvideox_tiny", "cogvideox_tiny_i2v", "cogvideox1.5_tiny", "cogvideox1.5_tiny_i2v")


@cache
def model_and_encoders(model: str):
    """Returns the configuration of a tiny model, and its encoders."""
    files = [f"configs/model/{model}.yaml", "configs/sft.yaml"]
    config = load_run_config(files, ["model.noised_image_dropout=0"], check_paths=False)
    encoders = build_encoders(config, torch.device("cpu"))
    encoders.load(text=False)
    return config, encoders


class Bench:
    """The conditions of a tiny model: its own, and those of one target under the names `own` and `other`."""

    def __init__(self, model: str, target: str | None = None, **params: object) -> None:
        config, self.encoders = model_and_encoders(model)
        choices = {name: ConditionConfig.of(target, params) for name in ("own", "other")} if target else {}
        self.config = replace(config, model=config.model.model_copy(update={"conditions": choices}))
        self.spec = self.config.spec
        self.conditions = {each.name: each for each in build_conditions(self.config, self.encoders)}
        self.shape = self.spec.latent(FRAMES, SIDE, SIDE)
        self.latent_shape = (1, self.shape.padded_frames, 16, self.shape.height, self.shape.width)

    @property
    def own(self) -> Condition:
        return self.conditions["own"]

    def inputs(self, sample: VideoSample, name: str = "own", *, drop: bool = False):
        condition = self.conditions[name]
        encoded = {part: stack_rows([tensor]) for part, tensor in self.encode(sample, name).items()}
        if drop:
            encoded = condition.drop(encoded, torch.tensor([True]))
        random = SampleRandomness(3, (sample.sample_index,))
        return condition.inputs(encoded, random, self.latent_shape)

    def encode(self, sample: VideoSample, name: str = "own"):
        with torch.no_grad():
            return self.conditions[name].encoded(sample, self.encoders)


def pixels(index: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def make_sample(*, training: bool = True, image: bool = False) -> VideoSample:
    mask = torch.zeros(FRAMES, 1, SIDE, SIDE, dtype=torch.uint8)
    mask[:, :, 4:12, 9:20] = 1
    turn = torch.linalg.qr(torch.randn(FRAMES, 3, 3, generator=torch.Generator().manual_seed(7)))[0]
    place = torch.randn(FRAMES, 3, 1, generator=torch.Generator().manual_seed(8))
    return VideoSample(
        clip_id="clip.mp4",
        sample_index=5,
        num_shown=FRAMES,
        video_tchw=pixels(1, FRAMES, 3, SIDE, SIDE),
        caption="a clip",
        image_chw=pixels(9, 3, SIDE, SIDE) if image else None,
        augmentation=AugmentationKey(3, 5),
        training=training,
        fields={
            "control": pixels(2, FRAMES, 3, SIDE, SIDE),
            "mask": mask,
            "reference": pixels(3, 3, SIDE, SIDE),
            "poses": torch.cat([turn, place], dim=2),
            "intrinsics": torch.tensor([30.0, 28.0, 15.0, 17.0]).expand(FRAMES, 4),
            "losers": pixels(4, 1, FRAMES, 3, SIDE, SIDE),
        },
    )


@pytest.fixture(scope="module")
def i2v() -> Bench:
    return Bench("cogvideox1.5_tiny_i2v")


@pytest.mark.parametrize("model", MODELS[1::2])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_first_frame_in_the_slot_is_the_image_condition_bit_for_bit(model, image, training):
    built_in, ours = Bench(model), Bench(model, "FramesInSlot")
    sample = make_sample(training=training, image=image)
    expected, given = built_in.inputs(sample, "image"), ours.inputs(sample)
    assert torch.equal(given.image_latent_btchw, expected.image_latent_btchw)
    assert given.channels_btchw is None
    assert "image" not in ours.conditions
    assert given.image_latent_btchw[:, 0].abs().sum() > 0


KNOWN = {  # latent frames with something in them, of the four of 1.5 and the three of 1.0
    "first": ({0}, {0}),
    "last": ({3}, {2}),
    "first_last": ({0, 3}, {0, 2}),
    "prefix": ({0, 1, 2}, {0, 1}),
    "all": ({0, 1, 2, 3}, {0, 1, 2}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("which", KNOWN)
def test_known_frames_stand_at_their_own_latent_frames(model, which):
    bench = Bench(model, "FramesInSlot", which=which, count=2)
    inputs = bench.inputs(make_sample())
    slot = inputs.image_latent_btchw if "i2v" in model else inputs.channels_btchw
    assert slot.shape == bench.latent_shape
    known = {frame for frame in range(slot.shape[1]) if slot[:, frame].any()}
    assert known == KNOWN[which][0 if "1.5" in model else 1]
    dropped = bench.inputs(make_sample(), drop=True)
    assert not any(tensor.any() for tensor in dropped.tensors().values())


def test_a_whole_video_in_the_slot_is_the_latent_of_the_clip(i2v):
    bench = Bench("cogvideox1.5_tiny_i2v", "FramesInSlot", which="all", noise_log_mean=None, field="control")
    sample = make_sample()
    control = Bench("cogvideox1.5_tiny_i2v", "ControlVideo")
    encoded, expected = bench.encode(sample), control.encode(sample)
    assert torch.equal(encoded["mean"], expected["mean"])
    slot = bench.inputs(sample).image_latent_btchw
    assert torch.equal(slot[:, 0], slot[:, 1]), "1.5 pads with copies of the first latent frame"


def test_random_frames_are_drawn_in_training_and_spread_evenly_in_validation():
    bench = Bench("cogvideox_tiny_i2v", "FramesInSlot", which="random", count=2)
    keys = [replace(make_sample(), augmentation=AugmentationKey(3, number)) for number in range(8)]
    drawn = [tuple(bench.encode(sample)["index"].tolist()) for sample in keys]
    assert set(drawn) == {(0, 1), (0, 2), (1, 2)}
    assert bench.encode(make_sample(training=False))["index"].tolist() == [0, 2]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("into", ["channels", "extras"])
def test_a_control_video_goes_where_the_settings_say(model, into):
    bench = Bench(model, "ControlVideo", into=into)
    inputs = bench.inputs(make_sample())
    ((name, tensor),) = inputs.tensors().items()
    assert name == {"channels": "channels_btchw", "extras": "own"}[into]
    assert tensor.shape == bench.latent_shape
    assert not torch.equal(tensor, bench.inputs(replace(make_sample(), sample_index=6)).tensors()[name])


@pytest.mark.parametrize("model", MODELS)
def test_control_pixels_are_those_of_each_latent_element_in_all_of_its_frames(model):
    bench, sample = Bench(model, "ControlPixels"), make_sample()
    (pixels_btchw,) = bench.inputs(sample).extras.values()
    assert pixels_btchw.shape == (1, bench.latent_shape[1], bench.own.params.width(bench.spec), 4, 4)
    control = sample.fields["control"] / 127.5 - 1
    groups = [[0] * 4] * (1 + bench.shape.padding) + [[1, 2, 3, 4], [5, 6, 7, 8]]
    for latent_frame, frames in enumerate(groups):
        for row, column in ((0, 0), (1, 3), (3, 2)):
            area = control[frames, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            own = pixels_btchw[0, latent_frame, :, row, column].view(4, 3, 8, 8)
            torch.testing.assert_close(own, area, rtol=0, atol=1e-6)
    assert (bench.inputs(sample, drop=True).extras["own"] == -1).all(), "a black video"


def test_no_two_latents_share_their_noise():
    bench = Bench("cogvideox_tiny", "ControlVideo")
    latents = [bench.inputs(make_sample(), name).channels_btchw for name in ("own", "other")]
    assert not torch.equal(*latents)


def test_rays_meet_the_pixels_that_they_go_through():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 3, 3, generator=generator).double())[0]
    turn = turn * torch.linalg.det(turn).sign()[:, None, None]
    place = torch.randn(4, 3, 1, generator=generator).double()
    intrinsics = torch.tensor([[50.0, 40.0, 31.0, 20.0]]).double().expand(4, 4)
    rays = pluecker_rays(intrinsics, torch.cat([turn, place], dim=2), (48, 64), (6, 8))
    moment, direction = rays[:, :3], rays[:, 3:]
    point = torch.cross(direction, moment, dim=1) + 5 * direction  # the ray's nearest to the origin, moved
    seen = torch.einsum("tji,tjhw->tihw", turn, point - place[..., None])
    u, v = (50 * seen[:, 0] / seen[:, 2] + 31, 40 * seen[:, 1] / seen[:, 2] + 20)
    centers_u, centers_v = torch.arange(8) * 8 + 4.0, torch.arange(6) * 8 + 4.0
    torch.testing.assert_close(u, centers_u.double().expand_as(u))
    torch.testing.assert_close(v, centers_v.double()[:, None].expand_as(v))


@pytest.mark.parametrize("model", MODELS)
def test_cameras_have_six_numbers_for_each_pixel_frame(model):
    bench = Bench(model, "PlueckerCameras")
    sample = make_sample()
    tensor = bench.inputs(sample).channels_btchw
    assert tensor.shape == (*bench.latent_shape[:2], 24, *bench.latent_shape[3:])
    assert bench.own.params.channels(bench.spec) == 24
    moved = sample.fields["poses"].clone()
    moved[:, :, 3] += torch.tensor([1.0, 2.0, 3.0])  # the world's origin is not the model's business
    other = bench.inputs(replace(sample, fields={**sample.fields, "poses": moved})).channels_btchw
    torch.testing.assert_close(other, tensor)


@pytest.mark.parametrize("model", MODELS)
def test_inpainting_sees_nothing_of_the_masked_part(model):
    bench = Bench(model, "Inpainting")
    sample = make_sample()
    other = sample.video_tchw.clone()
    other[:, :, 4:12, 9:20] = 200
    tensors = [bench.inputs(each).channels_btchw for each in (sample, replace(sample, video_tchw=other))]
    assert torch.equal(*tensors)
    assert tensors[0].shape[2] == 17
    mask = tensors[0][0, :, 16]
    expected = torch.zeros(4, 4)
    expected[0:2, 1:3] = 1  # rows 4 to 11 and columns 9 to 19, in elements of 8 pixels
    assert torch.equal(mask, expected.expand_as(mask))


def test_the_mask_grows_in_training_alone():
    bench = Bench("cogvideox_tiny", "Inpainting", grow=12)
    masks = {True: set(), False: set()}
    for training in masks:
        for number in range(6):
            sample = replace(make_sample(training=training), augmentation=AugmentationKey(3, number))
            masks[training].add(float(bench.encode(sample)["mask"].sum()))
    assert len(masks[True]) > 1
    assert masks[False] == {min(masks[False])}
    assert min(masks[True]) >= min(masks[False])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("position", ["continue", "repeat_first"])
def test_reference_frames_have_their_own_places_in_time(model, position):
    bench = Bench(model, "ReferenceFrames", position=position)
    inputs = bench.inputs(make_sample())
    count = 2 if "1.5" in model else 1  # whole patches
    assert inputs.frames_bfchw.shape == (1, count, *bench.latent_shape[2:])
    first = bench.latent_shape[1] if position == "continue" else 0
    assert inputs.frame_index_f.tolist() == list(range(first, first + count))


def test_losers_are_encoded_as_clips_and_no_input_of_the_network():
    bench = Bench("cogvideox_tiny", "PreferencePairs")
    sample = make_sample()
    encoded = bench.encode(sample)
    expected = bench.encoders.video(sample.fields["losers"][0], subject="a loser")
    assert torch.equal(encoded["mean"], expected["mean"][None])
    assert not bench.inputs(sample).tensors()
    assert bench.own.training_only


@pytest.mark.parametrize("how", ["mean", "last", "stack"])
def test_values_of_frames_become_values_of_latent_frames(how, i2v):
    x = torch.arange(9.0)
    expected = {
        "mean": [0.0, 0.0, 2.5, 6.5],
        "last": [0.0, 0.0, 4.0, 8.0],
        "stack": [[0.0] * 4, [0.0] * 4, [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]],
    }
    assert to_latent_frames(x, how, i2v.spec).tolist() == expected[how]


class Curious(Condition):
    """A condition that reads something, as `encode` is given it."""

    name = "curious"
    tensors = frozenset({"x"})
    reads_caption = False

    def __init__(self, read):
        super().__init__()
        self.encode = lambda sample, encoders: {"x": torch.tensor(float(bool(read(sample, encoders))))}


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda sample, _: sample.caption, r"`caption`.*reads_caption = True"),
        (lambda sample, _: sample.generator("x"), r"`generator`.*augments = True"),
        (lambda sample, _: sample.training, r"`training`.*augments = True"),
        (lambda sample, _: sample.fields["control"], r"the field 'control'.*FieldName"),
        (lambda sample, _: sample.sample_index, r"`sample_index`"),
        (lambda _, encoders: encoders.text("a"), r"`text`.*encodes_text = True"),
    ],
)
def test_reading_what_the_cache_key_leaves_out_is_an_error(i2v, read, says):
    with pytest.raises(SatTrainError, match=rf"(?s)condition 'curious': encode reads {says}"):
        Curious(read).encoded(make_sample(), i2v.encoders)


def test_reading_what_is_declared_is_not(i2v):
    curious = Curious(lambda sample, _: sample.caption and sample.generator("x"))
    curious.reads_caption = curious.augments = True
    assert curious.encoded(make_sample(), i2v.encoders)["x"] == 1


def test_a_prompt_without_the_field_is_refused_by_name():
    bench = Bench("cogvideox_tiny", "ControlVideo")
    with pytest.raises(SatTrainError, match="'own': this sample has no field 'control'"):
        bench.encode(replace(make_sample(), fields={}))


@pytest.mark.parametrize(("frames", "rows"), [("pixel", FRAMES), ("last", 3), ("stack", 3)])
def test_the_numbers_of_a_field_reach_modules_under_the_condition_s_name(frames, rows):
    bench, sample = Bench("cogvideox_tiny", "FieldValues", field="poses", frames=frames), make_sample()
    (given,) = bench.inputs(sample).extras.values()
    assert list(bench.inputs(sample).extras) == ["own"]
    assert given.shape == (1, rows, *([4] if frames == "stack" else []), 3, 4)
    last = given[0, -1, -1] if frames == "stack" else given[0, -1]
    assert torch.equal(last, sample.fields["poses"][-1])
    assert not bench.inputs(sample, drop=True).extras["own"].any()
