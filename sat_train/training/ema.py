"""An exponential moving average of the trained weights, sharded like the optimizer's fp32 masters.

It is kept by parameter name and offset, not by rank, so any optimizer and ZeRO stage carries it and a
checkpoint of it can be put together for another number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank keeps in fp32.

    Args:
        name: Name of the parameter in the DiT.
        offset: Where the part begins in the flattened parameter.
        master: [n], fp32: a view of the optimizer's master weights, or of the parameter where it is fp32.
    """

    name: str
    offset: int
    master: torch.Tensor


def master_fragments(engine: Any, mesh: ProcessMesh) -> list[Fragment]:
    """Returns this rank's parts of the trained weights; over the data axis they make the whole, once.

    Source: microsoft/DeepSpeed@v0.19.8 `deepspeed/utils/tensor_fragment.py`.
    """
    stage = int(engine.zero_optimization_stage())
    pick = {0: _plain_fragment, 1: _linked_fragment, 2: _linked_fragment, 3: _partitioned_fragment}[stage]
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    fragments = [pick(name, parameter, mesh) for name, parameter in trained]
    return [fragment for fragment in fragments if fragment is not None and fragment.master.numel()]


def _plain_fragment(name: str, parameter: torch.nn.Parameter, mesh: ProcessMesh) -> Fragment:
    size = -(-parameter.numel() // mesh.data_size)
    start = min(size * mesh.data_rank, parameter.numel())
    return Fragment(name, start, parameter.detach().flatten()[start : start + size])


def _linked_fragment(name: str, parameter: torch.nn.Parameter, mesh: ProcessMesh) -> Fragment | None:
    link: Any = parameter._hp_mapping
    if link is None:  # wholly in another rank's partition
        return None
    return Fragment(name, link.lp_fragment_address.start, link.hp_fragment.detach())


def _partitioned_fragment(name: str, parameter: torch.nn.Parameter, mesh: ProcessMesh) -> Fragment:
    from deepspeed.utils import safe_get_local_fp32_param

    padded = safe_get_local_fp32_param(parameter).detach().flatten()
    start = padded.numel() * mesh.data_rank
    used = max(0, min(padded.numel(), int(parameter.ds_numel) - start))
    return Fragment(name, start, padded[:used])


class ExponentialMovingAverage:
    """`average <- decay * average + (1 - decay) * weights`, after every optimizer step.

    Args:
        engine: DeepSpeed engine; its weights now are the first average.
        mesh: The process mesh.
        decay: In (0, 1).
    """

    def __init__(self, engine: Any, mesh: ProcessMesh, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._mesh = mesh
        fragments = self._fragments()
        self._keys = [(fragment.name, fragment.offset) for fragment in fragments]
        self._averages = [fragment.master.float().clone() for fragment in fragments]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of this step in."""
        masters = [fragment.master.float() for fragment in self._fragments()]
        torch._foreach_lerp_(self._averages, masters, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's part: `{"decay": d, "fragments": [{"name", "offset", "values"}]}`."""
        fragments = [
            {"name": name, "offset": offset, "values": average}
            for (name, offset), average in zip(self._keys, self._averages, strict=True)
        ]
        return {"decay": self.decay, "fragments": fragments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this rank's part out of the parts that are given, however they are sharded.

        Args:
            state: From `state_dict`: of this rank, or with the fragments of all ranks of another number.

        Raises:
            CheckpointError: They belong to other parameters, or elements are missing.
        """
        saved: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for fragment in state["fragments"]:
            saved.setdefault(fragment["name"], []).append((fragment["offset"], fragment["values"]))
        trained = {name for name, p in self._engine.module.named_parameters() if p.requires_grad}
        if unknown := sorted(saved.keys() - trained):
            raise CheckpointError(f"the weight average has parts of other parameters: {unknown[:5]}")
        for (name, offset), average in zip(self._keys, self._averages, strict=True):
            copied = sum(
                _copy_overlap(average, offset, values, start) for start, values in saved.get(name, [])
            )
            if copied != average.numel():
                raise CheckpointError(
                    f"the average has {copied} of {average.numel()} elements of {name} from {offset} on"
                )

    def _fragments(self) -> list[Fragment]:
        return master_fragments(self._engine, self._mesh)


def _copy_overlap(target: torch.Tensor, target_start: int, source: torch.Tensor, source_start: int) -> int:
    """Copies what two parts of one flattened parameter have in common; returns how many elements that is."""
    start = max(target_start, source_start)
    count = min(target_start + target.numel(), source_start + source.numel()) - start
    if count <= 0:
        return 0
    target[start - target_start :][:count].copy_(source[start - source_start :][:count])
    return count
