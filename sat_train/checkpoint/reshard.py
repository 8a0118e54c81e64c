"""Resuming with another number of data ranks: each rank's shard is made from those of the ranks that
saved.

DeepSpeed asks its checkpoint engine for this rank's files and loads what it is given. So the files of the new
layout need not exist: they are put together when they are asked for, from the old ones, which stay as they
are. DeepSpeed's own way (`ds_to_universal`) writes a second copy of the checkpoint first, and carries Adam's
state only.

Source: microsoft/DeepSpeed@v0.19.8 `runtime/zero/stage_1_and_2.py` `_load_legacy_checkpoint`,
`runtime/zero/stage3.py`
    `_rigid_load_state_dict`, for what is read and how it is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_train.checkpoint.consolidate import read_model_states, read_optimizer_states, read_span
from sat_train.checkpoint.engine_io import ShardFiles, State, saved_shapes, without_sat_keys
from sat_train.checkpoint.manifest import Manifest

_MASTERS_1_2 = "single_partition_of_fp32_groups"
_MASTERS_3 = "fp32_flat_groups"


class ReshardedFiles(ShardFiles):
    """Gives DeepSpeed the files of one rank of another layout than was saved.

    Args:
        engine: The engine that loads.
        folder: A committed step, written at the same ZeRO stage and size of the model axis.
        manifest: Its manifest.
        data_rank: This process on the data axis.
        data_size: Data ranks now.
        model_rank: This process on the model axis.
    """

    def __init__(
        self,
        engine: Any,
        *,
        folder: Path,
        manifest: Manifest,
        data_rank: int,
        data_size: int,
        model_rank: int,
    ) -> None:
        super().__init__()
        self._shapes = {
            name: shape
            for group in saved_shapes(read_model_states(folder, manifest, model_rank)[0])
            for name, shape in group.items()
        }
        self._engine, self._folder, self._manifest = engine, folder, manifest
        self._rank, self._size, self._model_rank = data_rank, data_size, model_rank
        # DeepSpeed looks for the file of this very rank, which need not have been among those that saved
        states = sorted(folder.glob(f"*mp_rank_{model_rank:02d}_model_states.pt"))
        engine._get_all_ckpt_names = lambda load_dir, tag: [str(states[0])] * max(1, engine.mp_world_size)

    def load(self, path: str | Path, map_location: Any = None) -> State:
        if Path(path).name.endswith("_model_states.pt"):
            return self._model_states()
        shards = read_optimizer_states(self._folder, self._manifest, self._model_rank)
        reshard = self._reshard_stage_3 if self._manifest.zero_stage == 3 else self._reshard_stage_1_2
        return {"optimizer_state_dict": reshard(shards)}

    def _model_states(self) -> State:
        states = read_model_states(self._folder, self._manifest, self._model_rank)
        state = {**without_sat_keys(states[0]), "dp_world_size": self._size}
        if state.get("frozen_param_fragments") and self._manifest.zero_stage == 3:
            state["frozen_param_fragments"] = {
                name: self._slice(
                    [other["frozen_param_fragments"][name].flatten() for other in states],
                    math.prod(shape),
                    math.ceil(math.prod(shape) / self._size),
                )
                for name, shape in state["frozen_param_shapes"].items()
            }
        return state

    def _reshard_stage_1_2(self, shards: Sequence[State]) -> State:
        """A group is one vector, split evenly; masters are saved without its padding, moments with it."""
        live = [group.numel() for group in self._engine.optimizer.single_partition_of_fp32_groups]
        assert not any(any(gaps) for gaps in shards[0].get("param_alignment_paddings") or []), (
            "aligned parameters"
        )
        totals = [sum(shard[_MASTERS_1_2][group].numel() for shard in shards) for group in range(len(live))]

        def split(pieces: Sequence[Tensor], group: int) -> Tensor:
            return self._slice(pieces, totals[group], live[group])

        base = shards[0]["base_optimizer_state"]
        state = {}
        for group, settings in enumerate(base["param_groups"]):
            key = settings["params"][0]
            padded = shards[0][_MASTERS_1_2][group].numel() + shards[0]["group_paddings"][group]
            state[key] = {
                name: split([shard["base_optimizer_state"]["state"][key][name] for shard in shards], group)
                if _is_per_element(value, padded)
                else value
                for name, value in base["state"].get(key, {}).items()
            }
        masters = [
            split([shard[_MASTERS_1_2][group] for shard in shards], group) for group in range(len(live))
        ]
        return {**shards[0], _MASTERS_1_2: masters, "base_optimizer_state": {**base, "state": state}}

    def _reshard_stage_3(self, shards: Sequence[State]) -> State:
        """Every parameter is split by itself; a rank's pieces follow each other in several vectors."""
        optimizer, names = self._engine.optimizer, self._engine.param_names
        vectors = [[names[parameter] for parameter in group] for group in optimizer.fp16_groups]

        def split(streams: Sequence[Sequence[Tensor]]) -> list[Tensor]:
            pieces = self._pieces(streams)
            return [torch.cat([pieces[name] for name in vector]) for vector in vectors]

        base = shards[0]["optimizer_state_dict"]
        first, length = base["state"].get(0, {}), shards[0][_MASTERS_3][0].numel()
        moments = {
            name: split([_moments(shard, name) for shard in shards])
            if _is_per_element(value, length)
            else [_copy(value) for _ in vectors]
            for name, value in first.items()
        }
        ids = iter(range(len(vectors)))
        members = list(optimizer.sub_group_to_group_id.values())
        groups = [
            {**settings, "params": [next(ids) for _ in range(members.count(index))]}
            for index, settings in enumerate(base["param_groups"])
        ]
        state = {key: {name: values[key] for name, values in moments.items()} for key in range(len(vectors))}
        masters = split([shard[_MASTERS_3] for shard in shards])
        return {
            **shards[0],
            _MASTERS_3: masters,
            "optimizer_state_dict": {**base, "state": state if first else {}, "param_groups": groups},
        }

    def _pieces(self, streams: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Returns this rank's piece of every parameter, given the vectors of all ranks that saved."""
        pieces, offset = {}, 0
        for name, shape in self._shapes.items():
            length = math.ceil(math.prod(shape) / len(streams))
            whole = [read_span(stream, offset, length) for stream in streams]
            pieces[name] = self._slice(whole, math.prod(shape), math.ceil(math.prod(shape) / self._size))
            offset += length
        return pieces

    def _slice(self, pieces: Sequence[Tensor], total: int, length: int) -> Tensor:
        """This rank's part of a vector of `total` values, padded with zeros to `length`."""
        start = min(self._rank * length, total)
        found = read_span(pieces, start, min(length, total - start))
        return torch.nn.functional.pad(found, (0, length - found.numel()))


def _is_per_element(value: object, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() == count


def _copy(value: Any) -> Any:
    """Optimizers count in place: vectors that shared one counter would count it up several times a step."""
    return value.clone() if isinstance(value, Tensor) else value


def _moments(shard: State, name: str) -> list[Tensor]:
    state = shard["optimizer_state_dict"]["state"]
    return [state[key][name] for key in sorted(state)]
