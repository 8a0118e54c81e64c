"""A file that is written tensor by tensor is the file of `torch.save`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.torch_file import write_lazily, write_tensors
from sat_train.files import write_file
from sat_train.weights.lazy import LazyWeights, Shard, from_tensors

TENSORS = {
    "matrix": torch.randn(300, 7).bfloat16(),
    "nothing": torch.empty(0, 3),
    "number": torch.tensor(3.5),
    "large": torch.randn(1 << 19),  # hashed in a second thread
    "whole numbers": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "nothing again": torch.empty(0),
}


@pytest.mark.parametrize("deterministic", [False, True])
def test_tensors_written_one_by_one_make_the_same_file(tmp_path: Path, deterministic: bool) -> None:
    together, lazily = tmp_path / "together.pt", tmp_path / "lazily.pt"
    torch.use_deterministic_algorithms(deterministic)
    try:
        records = [
            write_file(together, lambda file: write_tensors({"module": TENSORS}, file)),
            write_file(lazily, lambda file: write_lazily("module", from_tensors(TENSORS, where=""), file)),
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert together.read_bytes() == lazily.read_bytes()
    assert records[0].sha256 == records[1].sha256
    loaded = torch.load(lazily, weights_only=True)["module"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_tensor_that_cannot_be_read_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    weights = from_tensors(TENSORS, where="")

    def unreadable(shard: Shard | None) -> torch.Tensor:
        raise OSError(5, "Input/output error")

    broken = {**weights.tensors, "number": replace(weights.tensors["number"], read=unreadable)}
    with pytest.raises(OSError, match="Input/output error"):
        write_file(
            tmp_path / "a.pt", lambda file: write_lazily("module", LazyWeights(broken, where=""), file)
        )
    assert list(tmp_path.iterdir()) == []
