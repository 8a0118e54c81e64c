"""Weights are read from disk once for each copy of the model, and every rank has them: gloo ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError, SatTrainError
from sat_train.interchange.shared_loading import load_weights_once
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard

pytestmark = pytest.mark.ranks


def _tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 4, generator=generator)
    return {"count": torch.tensor(seed), "row": matrix[0].bfloat16(), "matrix": matrix, "turned": matrix.t()}


def _module() -> nn.Module:
    module = nn.Module()
    for name, tensor in _tensors(0).items():
        module.register_buffer(name, tensor)
    return module


def _load(mesh: ProcessMesh, broken: str) -> tuple[list[str], dict[str, Tensor] | str]:
    """Returns what this rank read, and what it has then: the tensors of its position on the model axis."""
    read: list[str] = []

    def read_one(name: str, tensor: Tensor, shard: Shard | None) -> Tensor:
        read.append(name)
        if name == broken:
            raise CheckpointError(f"{name} is damaged")
        return tensor

    lazy = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(read_one, name, tensor))
        for name, tensor in _tensors(1 + mesh.model_rank).items()
    }
    module = _module()
    try:
        load_weights_once(module, LazyWeights(lazy, where="disk"), mesh)
    except SatTrainError as error:
        return read, str(error)
    return read, dict(module.state_dict())


@pytest.mark.parametrize("model_size", [1, 2])
def test_each_tensor_is_read_by_one_rank_of_the_data_axis_and_comes_to_all(rank_pool, model_size):
    results = rank_pool(2)(_load, "", model_parallel_size=model_size)
    for model_rank in range(model_size):
        expected = _tensors(1 + model_rank)
        copies = results[model_rank::model_size]
        assert sorted(name for read, _ in copies for name in read) == sorted(expected)
        for _, state in copies:
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_tensor_that_one_rank_cannot_read_is_named_on_all(rank_pool):
    messages = [message for _, message in rank_pool(2)(_load, "row")]
    assert all("row is damaged" in message for message in messages), messages
