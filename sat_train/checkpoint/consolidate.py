"""Assembles the whole weights of a committed step from the files of all ranks.

Files are memory-mapped, and a tensor is assembled when it is accessed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sat_train.checkpoint.fragments import AVERAGE, MASTER, read_fragments
from sat_train.checkpoint.layout import SAT_PREFIX, model_file_name
from sat_train.checkpoint.manifest import Manifest
from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.weights.lazy import LazyWeights, from_tensors
from sat_train.weights.names import DTYPES
from sat_train.weights.readers import check_all_plain, load_torch_file
from sat_train.weights.tensor_parallel import merge_slices

_MOST_RANKS = 1_000_000
_REMEDY = "use another step"


def read_step(folder: Path, manifest: Manifest, *, ema: bool = False) -> LazyWeights:
    """Returns all weights of a step: trained ones as fp32 masters, the others as they were saved.

    Args:
        folder: A committed step.
        manifest: Its manifest.
        ema: Return the average in place of the trained weights.

    Returns:
        Whole tensors under SAT's keys, without prefix. If `manifest.trainable_only`, without the frozen ones.

    Raises:
        CheckpointError: A file is missing or damaged, or `ema` is set and no average was saved.
    """
    computing = read_computing_weights(folder, manifest)
    trained = read_fragments(folder, manifest).whole(AVERAGE if ema else MASTER)
    if ema and not trained:
        raise CheckpointError(
            f"{folder} holds no average of the weights",
            remedy="set args.ema_decay in training, or leave out --ema",
        )
    strays = sorted(trained.keys() - computing.keys())
    if strays:
        raise CheckpointError(f"{folder} trains {strays[0]}, which its model lacks", remedy=_REMEDY)
    return LazyWeights({**computing.tensors, **trained.tensors}, where=str(folder))


def read_computing_weights(folder: Path, manifest: Manifest) -> LazyWeights:
    """Returns all weights of a step as the run computed with them: in half precision, rounded masters.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    ranks = manifest.model_size * manifest.data_size
    if not 1 <= ranks <= _MOST_RANKS:
        raise CheckpointError(f"{folder} claims to be written by {ranks} ranks", expected="its own manifest")
    expected = "a step as sat_train wrote it"
    with reading(folder, error=CheckpointError, expected=expected, remedy=_REMEDY):
        slices = [_read_model_file(folder, rank) for rank in range(manifest.model_size)]
    return merge_slices(slices, where=str(folder))


def trained_dtype(manifest: Manifest) -> torch.dtype:
    """Returns the precision that a run computed in."""
    return DTYPES[manifest.dtype]


def _read_model_file(folder: Path, model_rank: int) -> LazyWeights:
    path = folder / model_file_name(model_rank)
    state = load_torch_file(path)
    check_all_plain(path, state)
    module: dict[str, Tensor] = state["module"]
    return from_tensors(
        {key.removeprefix(SAT_PREFIX): tensor for key, tensor in module.items()}, where=str(folder)
    )
