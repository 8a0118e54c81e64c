"""Laws of what modules read: the context of a block, its extras, and the inputs that conditions give."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.models.dit.block import attention_forward
from sat_train.models.dit.mixin import Mixin
from tests.networks import build_network
from tests.unit.models.mixins import WIDTH, Branch, context_of, with_modules
from tests.unit.models.narrow import inputs


def test_blocks_can_read_their_context_and_not_write_it():
    class Writing(Mixin):
        def after_block(self, x_bld, *, part, block, context):
            context.extras["note"] = x_bld
            return x_bld

    with pytest.raises(TypeError, match="does not support item assignment"):
        with_modules({"writing": Writing()})(*inputs())
    with pytest.raises(AttributeError, match="can't set attribute"):
        context_of(build_network()).text_length = 3


def test_each_block_sees_the_extras_of_all_and_its_own():
    context, everywhere, own = context_of(build_network()), torch.ones(2), torch.zeros(2)
    dealt = [context.for_block(index, {"a": everywhere, "b": {1: own}}).extras for index in (0, 1)]
    assert dealt == [{"a": everywhere}, {"a": everywhere, "b": own}]


def test_video_tokens_go_out_and_back_to_their_place():
    context = context_of(build_network()).with_tokens(2)
    x_bld = torch.randn(2, 5 + 18 + 2, WIDTH)
    video_bthwd = context.video(x_bld)
    assert video_bthwd.shape == (2, 3, 2, 3, WIDTH)
    assert torch.equal(video_bthwd[:, 1, 1, 2], x_bld[:, 5 + 6 + 3 + 2])
    back = context.tokens(video_bthwd)
    assert back.shape == x_bld.shape
    assert torch.equal(back[:, 5:23], x_bld[:, 5:23])
    assert not back[:, :5].any()
    assert not back[:, 23:].any()


def test_tokens_that_a_module_appends_are_not_rotated():
    """Attention to all text twice and to the rest once, against the same with its weights written out."""
    dit = with_modules({})
    block, context = dit.blocks[1], context_of(dit)
    x_bld = torch.randn(2, 23, WIDTH)
    longer = torch.cat([x_bld, x_bld[:, :5]], dim=1)  # text is not rotated either
    actual = block.run(attention_forward, longer, context=context.with_tokens(5))

    class TextTwice(Mixin):
        def attention_fn(self, query, key, value, *, part, block, context, old_impl):
            bias = torch.zeros(23)
            bias[:5] = math.log(2)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(23, 23))

    twice = with_modules({"twice": TextTwice()}).blocks[1].run(attention_forward, x_bld, context=context)
    assert torch.allclose(actual[:, :23], twice, atol=1e-5)  # one softmax of fp32 in two ways


def test_extras_are_cast_to_the_dtype_of_the_weights_unless_they_say_fp32():
    extras = {
        "depth": torch.ones(2, 3),
        "place_fp32": torch.ones(2, 3),
        "index": torch.ones(2, dtype=torch.int64),
    }
    seen: dict[str, Tensor] = {}

    class Reading(Mixin):
        def before_blocks(self, hidden_bld, forward):
            seen.update(forward.extras)

    with_modules({"reading": Reading()}, dtype=torch.bfloat16)(*inputs(), extras=extras)
    assert {name: value.dtype for name, value in seen.items()} == {
        "depth": torch.bfloat16,
        "place_fp32": torch.float32,
        "index": torch.int64,
    }


def test_extras_have_a_name_of_their_own_and_a_row_for_each_sample():
    with pytest.raises(AssertionError, match="extras control: 1 rows, another batch"):
        build_network()(*inputs(), extras={"control": torch.ones(1, 2)})
    with pytest.raises(AssertionError, match="extras control are set twice: name them after the module"):
        with_modules({"control": Branch(0)})(*inputs(), extras={"control": torch.ones(2, 1)})
