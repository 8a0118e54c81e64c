"""Encodings on their way from a worker to the training process."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
import torch

from sat_train.data.batch import CachedSample


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_image", [False, True])
def test_arrive_as_they_were_sent(dtype: torch.dtype, has_image: bool) -> None:
    moments, image = draw(2, 3, 5, 7, 9, dtype=dtype), draw(2, 1, 5, 7, 9)
    sent = CachedSample(
        moments, -moments.transpose(3, 4), draw(2, 3, 11, dtype=torch.bfloat16), image if has_image else None
    )
    found = pickle.loads(pickle.dumps(sent))
    for field in fields(CachedSample):
        before, after = getattr(sent, field.name), getattr(found, field.name)
        if before is None:
            assert after is None
        else:
            assert after.dtype == before.dtype
            assert torch.equal(after, before)


def test_are_one_piece_of_shared_memory() -> None:
    sent = CachedSample(draw(1, 3, 2, 4, 4), draw(1, 3, 2, 4, 4), draw(1, 7, 8))
    memory, _ = sent.__reduce__()[1]
    assert memory.is_shared()
    found = pickle.loads(pickle.dumps(sent))
    tensors = (found.mean_btchw, found.logvar_btchw, found.text_bld)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
