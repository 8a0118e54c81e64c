"""The whole fp32 weights of a committed step, put together from DeepSpeed's pieces.

Pieces are read as they are needed: the files are mapped, and a tensor is assembled when it is asked for.
DeepSpeed's own `zero_to_fp32` holds all at once, loses what is frozen at stage 1, and runs code from the
files.

Source: microsoft/DeepSpeed@v0.19.8 `utils/zero_to_fp32.py` for the layout of the flat buffers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_train.checkpoint.layout import SAT_PREFIX, ema_file_name
from sat_train.checkpoint.lazy import LazyTensor, LazyWeights, Shard, lazy_tensor, shard_tensor
from sat_train.checkpoint.manifest import Manifest
from sat_train.checkpoint.names import Shape
from sat_train.checkpoint.readers import check_all_plain, load_torch_file
from sat_train.checkpoint.tensor_parallel import merge_slices
from sat_train.errors import CheckpointError
from sat_train.files import reading

State = dict[str, Any]
_MOST_RANKS = 1_000_000


def read_step(folder: Path, manifest: Manifest, *, ema: bool = False) -> LazyWeights:
    """Returns all weights of a step: trained ones as fp32 masters, the others as they were saved.

    Args:
        folder: A committed step.
        manifest: Its manifest.
        ema: The average in place of the trained weights.

    Returns:
        Whole tensors under SAT's keys, without prefix. When `manifest.trainable_only` the frozen ones are not
        among them.

    Raises:
        CheckpointError: A file is missing or damaged; an average was asked for and none was saved.
    """
    ranks = manifest.model_size * manifest.data_size
    if not 1 <= ranks <= _MOST_RANKS:
        raise CheckpointError(f"{folder} claims to be written by {ranks} ranks", expected="its own manifest")
    slices = [_read_model_rank(folder, manifest, rank, ema=ema) for rank in range(manifest.model_size)]
    return merge_slices(slices, where=str(folder))


def trained_dtype(folder: Path, manifest: Manifest) -> torch.dtype:
    """Returns the precision that a run computed in."""
    config = read_model_states(folder, manifest, 0)[0]["ds_config"]
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(section, {}).get("enabled"):
            return dtype
    return torch.float32


def _read_model_rank(folder: Path, manifest: Manifest, model_rank: int, *, ema: bool) -> LazyWeights:
    with reading(
        folder, error=CheckpointError, expected="a step as sat_train wrote it", remedy="use another"
    ):
        return LazyWeights(_lazy_tensors(folder, manifest, model_rank, ema=ema), where=str(folder))


def _lazy_tensors(folder: Path, manifest: Manifest, model_rank: int, *, ema: bool) -> dict[str, LazyTensor]:
    weights = read_model_states(folder, manifest, model_rank)
    module = {key.removeprefix(SAT_PREFIX): tensor for key, tensor in weights[0]["module"].items()}
    groups = weights[0].get("param_shapes") or []
    trained = {name: tuple(shape) for group in groups for name, shape in group.items()}
    if manifest.zero_stage == 0:
        lazy_tensors = {name: lazy_tensor(tensor) for name, tensor in module.items()}
        trained = {name: tuple(tensor.shape) for name, tensor in module.items()}
    elif manifest.zero_stage == 3:
        lazy_tensors = {
            **_buffers(weights[0], module),
            **_frozen_stage_3(weights),
            **_stage_3(folder, manifest, model_rank, trained),
        }
    else:
        # all of the module is here in half precision; the trained ones are replaced by their masters
        lazy_tensors = {name: lazy_tensor(tensor) for name, tensor in module.items()}
        lazy_tensors.update(_stage_1_2(folder, manifest, model_rank, groups))
    if ema:
        lazy_tensors.update(_averages(folder, manifest, model_rank, trained))
    return lazy_tensors


def read_model_states(folder: Path, manifest: Manifest, model_rank: int) -> list[State]:
    tail = f"mp_rank_{model_rank:02d}_model_states.pt"
    names = (
        [f"zero_pp_rank_{rank}_{tail}" for rank in range(manifest.data_size)]
        if manifest.zero_stage == 3
        else [tail]
    )
    return [_load(folder / name) for name in names]


def read_optimizer_states(folder: Path, manifest: Manifest, model_rank: int) -> list[State]:
    pattern = re.compile(rf"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_{model_rank:02d}_optim_states\.pt")
    found = {
        int(match[1]): record.name for record in manifest.files if (match := pattern.fullmatch(record.name))
    }
    if sorted(found) != list(range(manifest.data_size)):
        raise CheckpointError(f"{folder} has optimizer shards of data ranks {sorted(found)} only")
    return [_load(folder / found[rank])["optimizer_state_dict"] for rank in range(manifest.data_size)]


def _load(path: Path) -> State:
    from sat_train.checkpoint.engine_io import SAFE_CLASSES  # imports DeepSpeed, which takes seconds

    state: State = load_torch_file(path, SAFE_CLASSES)
    check_all_plain(path, state)
    return state


def _buffers(state: State, module: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: lazy_tensor(module[name]) for name in state["buffer_names"] if name in module}


def _stage_1_2(
    folder: Path, manifest: Manifest, model_rank: int, groups: Sequence[dict[str, Shape]]
) -> dict[str, LazyTensor]:
    """Each group is one flat vector in the order of its parameters, split into one partition a rank."""
    shards = read_optimizer_states(folder, manifest, model_rank)
    gaps = shards[0].get("param_alignment_paddings")
    lazy_tensors = {}
    for index, group in enumerate(groups):
        partitions = [shard["single_partition_of_fp32_groups"][index] for shard in shards]
        offset = 0
        for position, (name, shape) in enumerate(group.items()):
            lazy_tensors[name] = _spanned(partitions, offset, tuple(shape))
            offset += math.prod(shape) + (gaps[index][position] if gaps else 0)
    return lazy_tensors


def _stage_3(
    folder: Path, manifest: Manifest, model_rank: int, shapes: dict[str, Shape]
) -> dict[str, LazyTensor]:
    """Every parameter is split over the ranks; a rank's pieces follow each other in its flat vectors."""
    flats = [shard["fp32_flat_groups"] for shard in read_optimizer_states(folder, manifest, model_rank)]
    lazy_tensors, offset = {}, 0
    for name, shape in shapes.items():
        length = math.ceil(math.prod(shape) / len(flats))
        lazy_tensors[name] = LazyTensor(
            shape, torch.float32, partial(_read_pieces, flats, offset, length, shape)
        )
        offset += length
    return lazy_tensors


def _frozen_stage_3(states: Sequence[State]) -> dict[str, LazyTensor]:
    lazy_tensors = {}
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        fragments = [state["frozen_param_fragments"][name].flatten() for state in states]
        lazy_tensors[name] = _spanned(fragments, 0, tuple(shape))
    return lazy_tensors


def _averages(
    folder: Path, manifest: Manifest, model_rank: int, trained: dict[str, Shape]
) -> dict[str, LazyTensor]:
    names = [
        ema_file_name(data_rank * manifest.model_size + model_rank) for data_rank in range(manifest.data_size)
    ]
    present = {record.name for record in manifest.files}
    if not present.issuperset(names):
        raise CheckpointError(
            f"{folder} holds no average of the weights",
            remedy="set args.ema_decay in training, or leave out --ema",
        )
    fragments: dict[str, list[tuple[int, Tensor]]] = {}
    for name in names:
        for fragment in _load(folder / name)["fragments"]:
            fragments.setdefault(fragment["name"], []).append((fragment["offset"], fragment["values"]))
    lazy_tensors = {}
    for name, pieces in fragments.items():
        ordered = [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
        held = sum(values.numel() for values in ordered)
        if held != math.prod(trained.get(name, (0,))):
            raise CheckpointError(f"{folder}: the average of {name} has {held} values", expected="its shape")
        lazy_tensors[name] = _spanned(ordered, 0, trained[name])
    return lazy_tensors


def _spanned(partitions: Sequence[Tensor], offset: int, shape: Shape) -> LazyTensor:
    """A lazy tensor that lies at `offset` in the concatenation of 1-D `partitions`."""

    def read(shard: Shard | None) -> Tensor:
        return shard_tensor(read_span(partitions, offset, math.prod(shape)).view(shape), shard)

    return LazyTensor(shape, partitions[0].dtype, read)


def read_span(partitions: Sequence[Tensor], offset: int, length: int) -> Tensor:
    pieces, start = [], 0
    for partition in partitions:
        first, last = max(offset - start, 0), min(offset + length - start, partition.numel())
        if first < last:
            pieces.append(partition[first:last])
        start += partition.numel()
    found = torch.cat(pieces) if pieces else partitions[0][:0]
    if found.numel() != length:
        raise CheckpointError(
            f"the flat buffers of the checkpoint end {length - found.numel()} values early",
            expected="the buffers that its shapes call for",
            remedy="use another step",
        )
    return found


def _read_pieces(
    flats: Sequence[Sequence[Tensor]], offset: int, length: int, shape: Shape, shard: Shard | None
) -> Tensor:
    whole = torch.cat([read_span(groups, offset, length) for groups in flats])
    return shard_tensor(whole[: math.prod(shape)].view(shape), shard)
