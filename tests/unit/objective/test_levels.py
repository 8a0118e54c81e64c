"""Laws of noise and of levels of single frames, in the loss and in sampling."""

from __future__ import annotations

import pytest
import torch

from sat_train.config.parts.timestep_parts import TimestepsConfig
from sat_train.diffusion.constant_guidance import ConstantGuidance
from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.errors import SatTrainError
from sat_train.objective.given import with_first_frames
from sat_train.objective.noising import NoiseLaw


def prefix(frames):
    return TimestepsConfig.of("PrefixClean", {"frames": frames}).build()


class AllAlike:
    """The sample's own timestep for each frame."""

    def __call__(self, uniform_b):
        return uniform_b

    def levels(self, timesteps_b, latent_shape, num_timesteps):
        return timesteps_b[:, None].expand(-1, latent_shape[1])


class Capped(AllAlike):
    """The first frame has at most a tenth of the schedule."""

    def levels(self, timesteps_b, latent_shape, num_timesteps):
        levels_bt = super().levels(timesteps_b, latent_shape, num_timesteps).clone()
        levels_bt[:, 0].clamp_(max=num_timesteps // 10)
        return levels_bt


class OneForAll(NoiseLaw):
    """One frame of noise, repeated."""

    def draw(self, random, shape, encoded):
        self.encoded = encoded
        frame = random.normal("noise", (1, *shape[1:]))
        return frame.expand(-1, shape[0], -1, -1, -1)


class Spy:
    """The transformer, with what it was given."""

    def __init__(self, dit):
        self.dit, self.latents, self.levels = dit, [], []

    def __call__(self, latent, timesteps, *arguments, levels_bt=None, **options):
        self.latents.append(latent)
        self.levels.append(levels_bt)
        return self.dit(latent, timesteps, *arguments, levels_bt=levels_bt, **options)


@pytest.mark.parametrize(("patch_t", "clean"), [(1, 1), (2, 2)])
def test_clean_frames_enter_as_they_are_and_do_not_count(make_pipeline, make_batch, encode, patch_t, clean):
    pipeline = make_pipeline(patch_t=patch_t, timestep_law=prefix(clean))
    batch = encode(pipeline, make_batch([0, 1], frames=13))
    inputs, spy = pipeline.training_inputs(batch), Spy(pipeline.dit)
    plain = make_pipeline(patch_t=patch_t).training_inputs(batch)
    assert torch.equal(inputs.timesteps_b, plain.timesteps_b)
    assert inputs.levels_bt[:, :clean].unique().tolist() == [-1]
    assert torch.equal(inputs.levels_bt[:, clean], inputs.timesteps_b)
    first = pipeline.loss(inputs, network=spy)
    assert torch.equal(spy.latents[0][:, :clean], inputs.x0_btchw[:, :clean])
    assert torch.equal(spy.levels[0], inputs.levels_bt)

    def elsewhere(*arguments, **options):
        v = pipeline.dit(*arguments, **options)
        return torch.cat([v[:, :clean] + 100, v[:, clean:]], dim=1)

    assert torch.equal(pipeline.loss(inputs, network=elsewhere).loss_b, first.loss_b)
    # min-SNR and the validation follow the sample's timestep
    at = pipeline.validation_inputs(batch, torch.tensor([100, 900]))
    assert at.levels_bt[:, -1].tolist() == [100, 900]


def test_levels_that_are_all_the_samples_change_nothing(make_pipeline, make_batch, encode):
    plain, pipeline = make_pipeline(), make_pipeline(timestep_law=AllAlike())
    batch = encode(plain, make_batch(range(4)))
    expected, found = plain.training_loss(batch), pipeline.training_loss(batch)
    torch.testing.assert_close(found.loss_b, expected.loss_b, rtol=1e-5, atol=0)  # another matrix shape


def test_a_clip_of_clean_frames_alone_is_named(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(timestep_law=prefix(3))
    batch = encode(pipeline, make_batch([7], frames=9))
    with pytest.raises(SatTrainError, match=r"7\.mp4: no latent frame is left to predict"):
        pipeline.training_loss(batch)


def generate(pipeline, sampler, history, *, frames=13, **options):
    run = {"num_frames": frames, "height": 16, "width": 16, "steps": 4, "seeds": [5], "sampler": sampler}
    prompts = ["a"] if history is None else [with_first_frames("a", history[0], num_frames=frames)]
    return pipeline.generate(prompts, guidance=ConstantGuidance(2.0), **run, **options)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpmpp_2m])
@pytest.mark.parametrize(("patch_t", "frames"), [(1, 13), (2, 13), (2, 9)])
def test_sampling_keeps_its_history_bit_for_bit(make_pipeline, monkeypatch, sampler, patch_t, frames):
    pipeline, clean = make_pipeline(patch_t=patch_t, timestep_law=prefix(2)), 2
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(256, (1, 5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    latent = pipeline.scale_factor * pipeline.encoders.video(history[0], subject="clip")["mean"]
    padding = pipeline.geometry.latent(frames, 16, 16).padding
    latent = torch.cat([latent[:1]] * padding + [latent])[:clean]
    spy, decoded = Spy(pipeline.dit), []
    decode = pipeline.encoders.decode
    monkeypatch.setattr(pipeline.encoders, "decode", lambda latent: decoded.append(latent) or decode(latent))
    video = generate(pipeline, sampler, history, frames=frames, network=spy)
    assert all(torch.equal(given[:, :clean], latent[None].expand(2, -1, -1, -1, -1)) for given in spy.latents)
    assert all(levels[:, :clean].eq(-1).all() and levels[:, clean:].ge(0).all() for levels in spy.levels)
    assert torch.equal(decoded[0][0, : clean - padding], latent[padding:] / pipeline.scale_factor)
    assert not torch.equal(video, generate(pipeline, sampler, history.flip(-1), frames=frames))


def test_a_history_that_does_not_fit_is_refused(make_pipeline):
    history = torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(SatTrainError, match=r"2 latent frames are given\n.* enough for 3 latent"):
        generate(make_pipeline(timestep_law=prefix(3)), sample_ddim, history)
    with pytest.raises(SatTrainError, match="0 latent frames are given"):
        generate(make_pipeline(timestep_law=prefix(1)), sample_ddim, None)
    with pytest.raises(SatTrainError, match="some frames less than others"):
        generate(make_pipeline(timestep_law=Capped()), sample_ddim, history)


def test_a_noise_law_is_that_of_training_and_of_the_first_noise(make_pipeline, make_batch, encode):
    law = OneForAll()
    pipeline, plain = make_pipeline(noise_law=law), make_pipeline()
    batch = encode(plain, make_batch([0, 3], frames=9))
    for name in ("training_inputs", "validation_inputs"):
        rest = () if name == "training_inputs" else (torch.tensor([10, 20]),)
        eps = getattr(pipeline, name)(batch, *rest).eps_btchw
        assert torch.equal(eps, eps[:, :1].expand_as(eps))
        assert set(law.encoded) == {"text"}
    spies = [Spy(pipeline.dit), Spy(plain.dit)]
    for each, spy in zip((pipeline, plain), spies, strict=True):
        run = {"num_frames": 9, "height": 16, "width": 16, "steps": 3, "seeds": [1], "network": spy}
        each.generate(["a"], guidance=ConstantGuidance(1.0), sampler=sample_dpmpp_2m, **run)
    own, base = spies[0].latents, spies[1].latents
    assert torch.equal(own[0], own[0][:, :1].expand_as(own[0]))
    assert torch.equal(own[0][:, 0], base[0][:, 0]), "a frame of noise is drawn first in both"
    assert not torch.equal(own[1], own[1][:, :1].expand_as(own[1])), "a sampler's own noise is normal"
