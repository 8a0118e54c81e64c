"""Encodings on their way from a worker to the training process."""

from __future__ import annotations

import pickle

import pytest
import torch

from sat_train.encoding.encoded_batch import EncodedBatch


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def batch(encodings: dict[str, dict[str, torch.Tensor]]) -> EncodedBatch:
    return EncodedBatch(encodings, ("a", "b"), (3, 4), (9, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_image", [False, True])
def test_arrive_as_they_were_sent(dtype: torch.dtype, has_image: bool) -> None:
    moments, image = draw(2, 3, 5, 7, 9, dtype=dtype), draw(2, 1, 5, 7, 9)
    sent = {
        "clip": {"mean": moments, "logvar": -moments.transpose(3, 4)},
        "text": {"text": draw(2, 3, 11, dtype=torch.bfloat16)},
        **({"image": {"mean": image, "logvar": -image}} if has_image else {}),
    }
    copy = pickle.loads(pickle.dumps(batch(sent)))
    assert (copy.clip_ids, copy.sample_indices, copy.num_shown) == (("a", "b"), (3, 4), (9, 9))
    assert copy.encodings.keys() == sent.keys()
    for name, tensors in sent.items():
        assert copy.encodings[name].keys() == tensors.keys()
        for part, before in tensors.items():
            after = copy.encodings[name][part]
            assert after.dtype == before.dtype
            assert torch.equal(after, before)


def test_are_one_piece_of_shared_memory() -> None:
    moments = {"mean": draw(1, 3, 2, 4, 4), "logvar": draw(1, 3, 2, 4, 4)}
    sent = batch({"clip": moments, "text": {"text": draw(1, 7, 8)}})
    memory, *_ = sent.__reduce__()[1]
    assert memory.is_shared()
    copy = pickle.loads(pickle.dumps(sent))
    tensors = [tensor for parts in copy.encodings.values() for tensor in parts.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
