"""Laws of the training loss: what it depends on, and what it does not."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sat_train.config import load_run_config
from sat_train.config.extensions import load_extensions
from sat_train.data.batches import StepPosition
from sat_train.diffusion.loss import min_snr_weight
from sat_train.encoding.conditions.image import ImageCondition
from sat_train.encoding.conditions.randomness import SampleRandomness
from sat_train.encoding.encode import Encode
from sat_train.errors import SatTrainError
from sat_train.models.encoders import pixels_to_unit
from tests.ranks.extensions import write_extensions

TIMESTEPS = "model.loss_fn_config.params.sigma_sampler_config.target"
EVERYTHING = {"caption_dropout": 0.4, "offset_noise_level": 0.1, "min_snr_gamma": 5.0}

# a batched matrix product sums in another order than a single one; losses are about 1
ORDER = {"rtol": 1e-5, "atol": 0}


@pytest.fixture
def forget_extensions():
    yield
    load_extensions([])


@pytest.mark.parametrize("image_to_video", [False, True])
def test_a_samples_loss_does_not_depend_on_the_batch_around_it(
    make_pipeline, make_batch, encode, image_to_video
):
    pipeline = make_pipeline(
        image_to_video=image_to_video,
        image_dropout=0.4,
        stratified=True,
        **EVERYTHING,
    )
    whole = pipeline.training_loss(encode(pipeline, make_batch(range(8))))
    for indices in ([0, 1, 2, 3], [6, 4], [7], [5]):
        part = pipeline.training_loss(encode(pipeline, make_batch(indices)))
        assert torch.equal(part.timesteps_b, whole.timesteps_b[indices])
        torch.testing.assert_close(part.loss_b, whole.loss_b[indices], **ORDER)


def test_the_random_inputs_of_a_sample_are_the_same_bits_in_any_batch(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(image_to_video=True, image_dropout=0.4, **EVERYTHING)
    whole = pipeline.training_inputs(encode(pipeline, make_batch(range(6))))
    part = pipeline.training_inputs(encode(pipeline, make_batch([4, 2])))
    assert torch.equal(part.eps_btchw, whole.eps_btchw[[4, 2]])
    assert torch.equal(part.timesteps_b, whole.timesteps_b[[4, 2]])
    assert torch.equal(part.dit.text_bld, whole.dit.text_bld[[4, 2]])


def test_other_seeds_and_other_samples_draw_other_numbers(make_pipeline, make_batch, encode):
    encoded = encode(make_pipeline(), make_batch([0, 1]))
    first = make_pipeline(seed=3).training_inputs(encoded)
    other = make_pipeline(seed=4).training_inputs(encoded)
    assert not torch.equal(first.eps_btchw[0], first.eps_btchw[1])
    assert not torch.equal(first.eps_btchw, other.eps_btchw)
    assert first.timesteps_b.tolist() != other.timesteps_b.tolist()


@pytest.mark.parametrize("image_to_video", [False, True])
def test_an_encoded_sample_is_the_same_bits_whatever_is_beside_it_and_however_it_came(
    make_pipeline, make_batch, encode, image_to_video
):
    """As with a cache: one sample was read, one is encoded, and the batch travelled from a worker."""
    pipeline = make_pipeline(image_to_video=image_to_video, **EVERYTHING)
    batch = make_batch([0, 1, 2], images=True)
    whole = encode(pipeline, batch)
    read = Encode(pipeline.encoders, pipeline.conditions).sample(batch.samples[1])
    mixed = encode(pipeline, replace(batch, samples=(batch.samples[0], read, batch.samples[2])))
    sent = encode(pipeline, pickle.loads(pickle.dumps(mixed)))
    expected = pipeline.training_loss(whole)
    assert torch.equal(pipeline.training_loss(mixed).loss_b, expected.loss_b)
    assert torch.equal(pipeline.training_loss(sent).loss_b, expected.loss_b)


class NormalDraws(TorchFunctionMode):
    """Counts draws of normal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.randn
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("image_to_video", [False, True])
def test_what_is_drawn_ahead_is_what_the_next_batch_would_draw(
    make_pipeline, make_batch, encode, image_to_video
):
    pipeline = make_pipeline(**EVERYTHING, image_to_video=image_to_video)
    first, second = (encode(pipeline, make_batch(indices)) for indices in ([0, 1], [2, 3]))
    pipeline.training_inputs(first)
    pipeline.draws.draw([2, 3])
    with NormalDraws() as ahead:
        inputs = pipeline.training_inputs(second)
    assert ahead.count == 0
    with NormalDraws() as late:
        expected = make_pipeline(**EVERYTHING, image_to_video=image_to_video).training_inputs(second)
    assert late.count >= 6, "posterior, noise and offset of two samples"
    assert torch.equal(inputs.x0_btchw, expected.x0_btchw)
    assert torch.equal(inputs.eps_btchw, expected.eps_btchw)


def test_posteriors_are_sampled_or_their_mean_is_taken(make_pipeline, make_batch, encode):
    batch = make_batch([0])
    pipeline = make_pipeline(posterior_sampling=False)
    encoded = encode(pipeline, batch)
    mean, logvar = encoded.encodings["clip"]["mean"], encoded.encodings["clip"]["logvar"]
    assert torch.equal(pipeline.training_inputs(encoded).x0_btchw, 0.7 * mean)
    eps = SampleRandomness(3, (0,)).normal("posterior", tuple(mean.shape[1:]))
    sampled = make_pipeline().training_inputs(encoded).x0_btchw
    torch.testing.assert_close(sampled, 0.7 * (mean + (logvar / 2).exp() * eps))


def test_a_dropped_caption_is_the_null_condition_of_guidance(make_pipeline, make_batch, encode):
    batch = make_batch(range(40), frames=1)
    for null_condition in ("zero", "empty_prompt"):
        pipeline = make_pipeline(caption_dropout=0.3, null_condition=null_condition)
        encoded = encode(pipeline, batch)
        text, full = pipeline.training_inputs(encoded).dit.text_bld, encoded.encodings["text"]["text"]
        every = torch.ones(40, dtype=torch.bool)
        null = pipeline.conditions[0].drop(encoded.encodings["text"], every)["text"]
        dropped = (text == null).flatten(1).all(1)
        kept = (text == full).flatten(1).all(1)
        assert bool((dropped ^ kept).all())
        assert 4 <= int(dropped.sum()) <= 22  # 12 expected, standard deviation 2.9
        expected = {"zero": torch.zeros(3, 8), "empty_prompt": pipeline.encoders.text("")}[null_condition]
        assert torch.equal(null[0], expected)


def test_a_known_embedding_stands_for_the_empty_prompt(make_pipeline):
    known = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    pipeline = make_pipeline(null_condition="empty_prompt", known_empty_prompt=lambda: known)
    text = {"text": torch.zeros(2, 3, 8)}
    null = pipeline.conditions[0].drop(text, torch.tensor([True, False]))["text"]
    assert torch.equal(null[0], known)
    assert not null[1].any()


def test_the_image_condition_is_the_scaled_latent_in_the_first_frame(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(image_to_video=True, posterior_sampling=False)
    timesteps = torch.zeros(2, dtype=torch.int64)
    for images in (False, True):
        plain, batch = (make_batch([0, 1], images=images, training=training) for training in (False, True))
        pixels = [pixels_to_unit(each.conditioning_image_chw(), "cpu") for each in batch.samples]
        mean = torch.stack([pipeline.encoders.frames(image[None])["mean"] for image in pixels])
        condition = pipeline.validation_inputs(encode(pipeline, plain), timesteps).dit.image_latent_btchw
        torch.testing.assert_close(condition[:, :1], 0.5 * mean)
        assert not condition[:, 1:].any()
        noised = pipeline.training_inputs(encode(pipeline, batch)).dit.image_latent_btchw
        assert not torch.equal(noised[:, :1], condition[:, :1])
        assert not noised[:, 1:].any()


@pytest.mark.parametrize("level", [{}, {"noise_log_mean": -1.0, "noise_log_std": 0.25}])
def test_the_noise_on_first_frames_is_log_normal_with_the_released_numbers_by_default(make_batch, level):
    """Of zai-org/CogVideo@7a1af71 `sat/diffusion_video.py` add_noise_to_first_frame."""
    condition = ImageCondition(scale=1.0, **level)
    pixels = SimpleNamespace(device="cpu", frames=lambda images: images)
    logs = []
    for noised, plain in zip(
        *(make_batch(range(300), frames=1, training=training).samples for training in (True, False)),
        strict=True,
    ):
        noise = condition.encode(noised, pixels) - condition.encode(plain, pixels)
        logs.append(noise.std().log())
    mean, std = level.get("noise_log_mean", -3.0), level.get("noise_log_std", 0.5)
    # five deviations of the estimates from 300 images of 768 numbers
    assert float(torch.stack(logs).mean()) == pytest.approx(mean, abs=5 * std / 300**0.5)
    assert float(torch.stack(logs).std()) == pytest.approx(std, abs=5 * std / 600**0.5)


def test_images_are_dropped_sample_by_sample(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(image_to_video=True, image_dropout=0.3)
    image = pipeline.training_inputs(encode(pipeline, make_batch(range(40), frames=1))).dit.image_latent_btchw
    dropped = ~image.flatten(1).any(1)
    assert 4 <= int(dropped.sum()) <= 22
    kept = pipeline.validation_inputs(
        encode(pipeline, make_batch(range(4), frames=1)), torch.zeros(4, dtype=torch.int64)
    )
    assert bool(kept.dit.image_latent_btchw.flatten(1).any(1).all())


def test_stratified_timesteps_cover_each_global_batch(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(stratified=True)
    orders = []
    for first in (0, 8, 16):
        halves = [range(first, first + 4), range(first + 4, first + 8)]  # as two ranks would hold them
        inputs = [pipeline.training_inputs(encode(pipeline, make_batch(half, frames=1))) for half in halves]
        timesteps = torch.cat([part.timesteps_b for part in inputs])
        strata = timesteps // 125
        assert sorted(strata.tolist()) == list(range(8))
        orders.append(strata.tolist())
    assert len({tuple(order) for order in orders}) == 3


def test_stratified_timesteps_cover_a_step_whose_samples_are_not_consecutive(
    make_pipeline, make_batch, encode
):
    """As with buckets; another rank count that gives the same samples the same places draws the same."""
    pipeline = make_pipeline(stratified=True)
    indices, step_positions = [3, 17, 4, 5, 41, 2, 90, 8], tuple(StepPosition(5, i, 8) for i in range(8))

    def draw(part: slice):
        batch = replace(make_batch(indices[part], frames=1), step_positions=step_positions[part])
        return pipeline.training_inputs(encode(pipeline, batch)).timesteps_b.tolist()

    whole = draw(slice(0, 8))
    assert sorted(timestep // 125 for timestep in whole) == list(range(8))
    assert [timestep for rank in range(4) for timestep in draw(slice(2 * rank, 2 * rank + 2))] == whole


def test_a_distribution_of_timesteps_from_outside_is_that_of_the_training_inputs(
    tmp_path, make_pipeline, make_batch, encode, forget_extensions
):
    write_extensions(tmp_path)
    words = ["--extension", str(tmp_path / "late_timesteps.py"), f"{TIMESTEPS}=Power"]
    config = load_run_config(["configs/sft.yaml"], words, check_paths=False)
    law = config.spec.timesteps.build()
    encoded = encode(make_pipeline(), make_batch(range(8), frames=1))
    for stratified in (False, True):
        uniform = make_pipeline(stratified=stratified).training_inputs(encoded).timesteps_b
        late = make_pipeline(stratified=stratified, timestep_law=law).training_inputs(encoded).timesteps_b
        # of the same random number, up to the rounding to whole timesteps
        assert ((late / 1000) ** 2 * 1000 - uniform).abs().max() <= 2


def test_validation_repeats_itself_and_drops_nothing(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(caption_dropout=1.0)
    batch, timesteps = make_batch([0, 1]), torch.tensor([100, 900])
    first = pipeline.validation_loss(encode(pipeline, batch), timesteps_b=timesteps)
    assert torch.equal(
        first.loss_b, pipeline.validation_loss(encode(pipeline, batch), timesteps_b=timesteps).loss_b
    )
    assert torch.equal(first.timesteps_b, timesteps)
    inputs = pipeline.validation_inputs(encode(pipeline, batch), timesteps)
    assert torch.equal(inputs.dit.text_bld, encode(pipeline, batch).encodings["text"]["text"])
    assert not torch.equal(inputs.eps_btchw, pipeline.training_inputs(encode(pipeline, batch)).eps_btchw)


@pytest.mark.parametrize("change", [{"seed": 7}, {"min_snr_gamma": 0.5}, {"offset_noise_level": 0.1}])
def test_runs_of_other_recipes_and_seeds_are_validated_alike(make_pipeline, make_batch, encode, change):
    batch, timesteps = make_batch([0, 1]), torch.tensor([5, 900])
    encoded = encode(make_pipeline(), batch)
    plain, other = make_pipeline(), make_pipeline(**change)
    assert not torch.equal(plain.training_loss(encoded).loss_b, other.training_loss(encoded).loss_b)
    one, two = (each.validation_loss(encoded, timesteps_b=timesteps).loss_b for each in (plain, other))
    assert torch.equal(one, two)


def test_min_snr_weights_each_sample(make_pipeline, make_batch, encode):
    batch, timesteps = make_batch([0, 1]), torch.tensor([5, 900])
    inputs = make_pipeline().validation_inputs(encode(make_pipeline(), batch), timesteps)
    plain = make_pipeline().loss(inputs)
    weighted = make_pipeline(min_snr_gamma=5.0).loss(inputs)
    weight = min_snr_weight(make_pipeline().alpha_bar[timesteps], 5.0)
    assert weight[0] < 0.1
    torch.testing.assert_close(weighted.loss_b, weight * plain.loss_b)
    torch.testing.assert_close(weighted.loss, weighted.loss_b.mean())


def test_only_the_transformer_gets_gradients_and_the_given_network_is_called(
    make_pipeline, make_batch, encode
):
    pipeline = make_pipeline()
    calls = []

    def network(*args, **kwargs):
        calls.append(kwargs.keys())
        return pipeline.dit(*args, **kwargs)

    output = pipeline.training_loss(encode(pipeline, make_batch([0])), network=network)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert not output.loss_b.requires_grad
    assert calls == [set()], "text-to-video has no other inputs"
    assert all(parameter.grad is not None for parameter in pipeline.dit.parameters())


def test_patches_in_time_repeat_the_first_latent_frame(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(image_to_video=True, patch_t=2, ofs=2.0)
    inputs = pipeline.training_inputs(encode(pipeline, make_batch([0], frames=9)))  # 3 latent frames
    assert inputs.x0_btchw.shape[1] == 4
    assert torch.equal(inputs.x0_btchw[:, 0], inputs.x0_btchw[:, 1])
    assert not torch.equal(inputs.eps_btchw[:, 0], inputs.eps_btchw[:, 1])
    assert inputs.dit.image_latent_btchw[:, 0].any()
    assert not inputs.dit.image_latent_btchw[:, 1:].any()
    assert pipeline.training_inputs(encode(pipeline, make_batch([0], frames=5))).x0_btchw.shape[1] == 2
    assert torch.isfinite(pipeline.loss(inputs).loss)


def test_a_clip_of_wrong_length_is_named(make_pipeline, make_batch, encode):
    with pytest.raises(SatTrainError, match=r"0\.mp4: 8 frames do not fit.*\n.*4 k \+ 1.*\n.*5 and 9"):
        make_pipeline().training_loss(encode(make_pipeline(), make_batch([0, 1], frames=8)))


def test_half_precision_noise_is_drawn_in_full_precision(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(dtype=torch.bfloat16)
    inputs = pipeline.training_inputs(encode(pipeline, make_batch([0])))
    assert inputs.x0_btchw.dtype == inputs.eps_btchw.dtype == torch.float32
    assert torch.equal(
        inputs.eps_btchw, make_pipeline().training_inputs(encode(make_pipeline(), make_batch([0]))).eps_btchw
    )
    pipeline.dit.to(torch.bfloat16)
    assert pipeline.loss(inputs).loss.dtype == torch.float32


@pytest.mark.parametrize("patch_t", [1, 2])
def test_frames_that_only_fill_a_short_clip_up_do_not_count(make_pipeline, make_batch, encode, patch_t):
    """Whatever is predicted there, the loss is that of the frames the clip gave."""
    pipeline = make_pipeline(patch_t=patch_t)
    batch = replace(encode(pipeline, make_batch([3, 4], frames=17)), num_shown=(17, 6))
    inputs = pipeline.training_inputs(batch)
    front = inputs.x0_btchw.shape[1] - 5  # of an odd number of latent frames the first one is repeated
    assert inputs.counted_bt.tolist() == [[True] * (front + 5), [True] * (front + 3) + [False, False]]
    plain = pipeline.loss(inputs)

    def disturbed(*args, **kwargs):
        v = pipeline.dit(*args, **kwargs)
        return torch.cat([v[:, : front + 3], v[:, front + 3 :] + 1], dim=1)

    other = pipeline.loss(inputs, network=disturbed)
    assert other.loss_b[0] > plain.loss_b[0]
    assert torch.equal(other.loss_b[1], plain.loss_b[1])
    assert pipeline.training_inputs(replace(batch, num_shown=(17, 17))).counted_bt is None
