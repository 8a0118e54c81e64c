"""Memory that runs out is no traceback but advice."""

import pytest
import torch

from sat_train.distributed.lack_of_memory import (
    PRECOMPUTE_REMEDY,
    SAMPLING_REMEDY,
    TRAINING_REMEDY,
    explaining_lack_of_memory,
)
from sat_train.errors import TrainingError


@pytest.mark.parametrize("remedy", [TRAINING_REMEDY, SAMPLING_REMEDY, PRECOMPUTE_REMEDY])
def test_memory_that_is_not_there_is_named_with_what_helps(remedy):
    with (
        pytest.raises(TrainingError, match=r"out of memory: .*allocate memory") as caught,
        explaining_lack_of_memory(remedy),
    ):
        torch.empty(2**55, dtype=torch.uint8)
    assert remedy in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), MemoryError()]
)
def test_the_allocators_of_devices_and_of_python_are_understood_too(error):
    with pytest.raises(TrainingError, match="out of memory"), explaining_lack_of_memory(TRAINING_REMEDY):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), explaining_lack_of_memory(TRAINING_REMEDY):
        raise RuntimeError("shapes differ")
