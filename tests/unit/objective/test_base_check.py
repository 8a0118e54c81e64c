"""A run with new modules or channels is compared with its base on its first sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sat_train.encoding.conditions.condition import Condition, DitInputs
from sat_train.errors import CheckpointError
from sat_train.interchange.surgery import PROJECTION, Surgery
from sat_train.models.dit.initialization import zero_
from sat_train.models.dit.mixin import Mixin
from sat_train.training.base_check import check_starts_as_base


class Adding(Mixin):
    """Adds a projection of the video tokens behind the first block."""

    def __init__(self, width: int, *, zero: bool = True) -> None:
        super().__init__()
        layer = nn.Linear(width, width)
        self.per_block = nn.ModuleDict({"0": zero_(layer) if zero else layer})

    def after_block(self, x_bld, *, part, block, context):
        return context.tokens(part(context.video(x_bld)))


class FrameFeatures(Mixin):
    """Adds zero to the time features of each patch in time."""

    def __init__(self) -> None:
        super().__init__()
        self.project = zero_(nn.Linear(1, 16))

    def time_features(self, forward):
        frames = forward.dit.patch_grid(forward.latent_btchw).frames
        ones_bf1 = forward.latent_btchw.new_ones(len(forward.latent_btchw), frames, 1)
        return self.project(ones_bf1)


class Meant(Adding):
    starts_as_base = False


class Channels(Condition):
    """Numbers next to the latent."""

    name = "channels"

    def inputs(self, encoded, random, latent_shape):
        b, t, c, h, w = latent_shape
        frames = torch.ones(b, 1, c, h, w)
        return DitInputs(
            channels_btchw=torch.ones(b, t, 4, h, w),
            frames_bfchw=frames,
            frame_index_f=torch.tensor([0]),
            extras={"note": torch.ones(b, 2)},
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_and_channels_that_begin_at_zero_pass(make_pipeline, make_batch, encode, dtype):
    pipeline = make_pipeline(dtype=dtype, image_to_video=True)
    pipeline.dit.to(dtype).train()
    pipeline.conditions = (pipeline.conditions[0], Channels())
    pipeline.dit.add_mixin("one", Adding(64).to(dtype))
    pipeline.dit.add_mixin("frames", FrameFeatures().to(dtype))
    pipeline.dit.add_mixin("trained", Adding(64, zero=False).to(dtype))  # its weights were in the file
    weight = pipeline.dit.get_parameter(PROJECTION).detach()
    file = weight[:, :4].clone()
    weight[:, 4:] = 0
    batch = encode(pipeline, make_batch([0]))
    surgery = Surgery(frozenset({"one", "frames"}), channels=4, projection=file)
    check_starts_as_base(pipeline, batch, surgery)
    assert pipeline.dit.training
    assert set(pipeline.dit.hooks.between["before_blocks"]) == set()
    assert {mixin.name for mixin, _ in pipeline.dit.blocks[0].acting["after_block"]} == {"one", "trained"}

    weight[0, 5] = 0.01
    with pytest.raises(CheckpointError, match=r"does not start as the base .*the widened patch embedding"):
        check_starts_as_base(pipeline, batch, surgery)
    weight[0, 5] = 0
    weight[:, :4] = file.flip(1)  # channels in another order
    with pytest.raises(CheckpointError, match=r"does not start as the base .*the widened patch embedding"):
        check_starts_as_base(pipeline, batch, surgery)


def test_a_module_that_changes_the_base_is_named_unless_it_means_to(make_pipeline, make_batch, encode):
    pipeline = make_pipeline()
    batch = encode(pipeline, make_batch([0]))
    for name, mixin in {"quiet": Adding(64), "loud": Adding(64, zero=False)}.items():
        pipeline.dit.add_mixin(name, mixin)
    surgery = Surgery(frozenset({"quiet", "loud"}), channels=4)
    with pytest.raises(CheckpointError, match=r"whose weights it loads: loud \([\d.e-]+\)\n") as refused:
        check_starts_as_base(pipeline, batch, surgery)
    assert "quiet" not in str(refused.value)
    pipeline.dit.del_mixin("loud")
    pipeline.dit.add_mixin("loud", Meant(64, zero=False))
    check_starts_as_base(pipeline, batch, surgery)
