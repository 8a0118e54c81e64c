"""Laws of sampling: shape, seeds, independence of the batch, progress, refusals."""

from __future__ import annotations

import pytest
import torch

from sat_train.diffusion.constant_guidance import ConstantGuidance
from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.errors import SatTrainError

RUN = {"num_frames": 5, "height": 16, "width": 16, "steps": 3, "guidance": ConstantGuidance(4.0)}


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpmpp_2m])
def test_a_video_depends_on_its_prompt_and_seed_only(make_pipeline, sampler):
    pipeline = make_pipeline()
    both = pipeline.generate(["a", "b"], seeds=[1, 2], sampler=sampler, **RUN)
    assert both.shape == (2, 5, 3, 16, 16)
    assert both.dtype == torch.uint8
    alone = pipeline.generate(["b"], seeds=[2], sampler=sampler, **RUN)
    # a batched matrix product sums in another order, which may tip a pixel between two levels
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    other_seed = pipeline.generate(["b"], seeds=[3], sampler=sampler, **RUN)
    assert (other_seed.int() - alone.int()).abs().max() > 1
    assert torch.equal(alone, pipeline.generate(["b"], seeds=[2], sampler=sampler, **RUN))


def test_the_image_is_felt(make_pipeline):
    pipeline = make_pipeline(image_to_video=True)
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    dark = pipeline.generate(["a"], image_bchw=image, seeds=[1], **RUN)
    bright = pipeline.generate(["a"], image_bchw=image + 255, seeds=[1], **RUN)
    assert not torch.equal(dark, bright)


@pytest.mark.parametrize("num_frames", [5, 9])
def test_padding_in_time_is_taken_off_again(make_pipeline, num_frames):
    pipeline = make_pipeline(patch_t=2)
    video = pipeline.generate(["a"], seeds=[1], **{**RUN, "num_frames": num_frames})
    assert video.shape[1] == num_frames


def test_without_guidance_the_network_sees_each_prompt_once(make_pipeline):
    pipeline = make_pipeline()
    seen = []

    def network(latent, *args, **kwargs):
        seen.append(len(latent))
        return pipeline.dit(latent, *args, **kwargs)

    pipeline.generate(["a"], seeds=[1], network=network, **{**RUN, "guidance": ConstantGuidance(1.0)})
    pipeline.generate(["a"], seeds=[1], network=network, **RUN)
    assert seen == [1, 1, 1, 2, 2, 2]


def test_guidance_pushes_away_from_the_null_condition(make_pipeline):
    """At scale 0 only the null condition is left, so that the prompt does not matter."""
    pipeline = make_pipeline(null_condition="empty_prompt")
    run = {**RUN, "seeds": [1]}
    unguided = pipeline.generate(["a"], **{**run, "guidance": ConstantGuidance(0.0)})
    assert torch.equal(unguided, pipeline.generate(["b"], **{**run, "guidance": ConstantGuidance(0.0)}))
    empty = pipeline.generate([""], **{**run, "guidance": ConstantGuidance(1.0)})
    assert (unguided.int() - empty.int()).abs().max() <= 1


def test_progress_is_reported_and_the_mode_restored(make_pipeline):
    pipeline = make_pipeline()
    pipeline.dit.train()
    seen = []
    pipeline.generate(
        ["a"], seeds=[1], progress=lambda *step: seen.append((*step, pipeline.dit.training)), **RUN
    )
    assert seen == [(0, 3, False), (1, 3, False), (2, 3, False)]
    assert pipeline.dit.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 6}, r"sample: 6 frames do not fit.*\n.*4 k \+ 1.*\n.*5 and 9"),
        ({"height": 18}, r"sample: 18x16 pixels do not divide.*\n.*multiple of 8 and"),
        ({"width": 0}, "16x0 pixels do not divide"),
    ],
)
def test_impossible_sizes_are_refused(make_pipeline, change, message):
    with pytest.raises(SatTrainError, match=message):
        make_pipeline().generate(["a"], seeds=[1], **{**RUN, **change})
