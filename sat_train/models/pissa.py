"""PiSSA: a LoRA that starts at the principal singular vectors of the weight, where most of a weight is.

The paper takes `W = (W - scale * B0 @ A0) + scale * B0 @ A0` and trains A and B from A0 and B0. Here W stays
as it is, and the differences to A0 and B0 are trained, from zero:

    W + scale * ((B0 + b) @ (A0 + a) - B0 @ A0) = W + scale * (B0 @ a + b @ (A0 + a))

The gradients are the paper's. The base keeps its weights and so its hash, its precision and its shards; a new
adapter changes nothing, bit for bit; half precision resolves a and b, which it would not next to A0 and B0;
and the right-hand side is, term by term, a LoRA of rank 2r on the base as released: the export. Weight decay
pulls towards the base. A0 and B0 are saved: another machine could compute others.

Source: arXiv:2404.02948, equations 2 to 4, with the fast decomposition of its section 5.6; huggingface/peft
    `subtract_mutated_init` for the rank of 2r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from sat import mpu
from torch import Tensor

from sat_train.config.parts.adapter_parts import AdapterParams
from sat_train.distributed.collectives import broadcast_object
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.seeds import derive_seed
from sat_train.errors import ConfigError, Fault
from sat_train.models.adapter import PARAMS_KEY, Adapter, LinearShape
from sat_train.models.dit.sharding import merge_shards, shard_weight
from sat_train.models.lora import Down, Up, dropout_of, empty_downs, empty_ups
from sat_train.models.low_rank import LowRank

# of the fast decomposition: the paper's iterations, and as usual some vectors more than are kept
_ITERATIONS, _SPARE = 16, 8


class Pissa(Adapter):
    """The update `B0(a(x)) + b(A0(x) + a(x))`, initially zero.

    Args:
        layer: The layer.
        rank: Principal components.
        scale: Factor on the update.
        dropout: Probability that an input channel of the update is dropped in training.
    """

    def __init__(self, layer: LinearShape, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, rank=rank, scale=scale)
        self.shift_A, self.shift_B = Down(empty_downs(layer, rank)), Up(empty_ups(layer, rank))
        downs, ups = (map(torch.zeros_like, empty(layer, rank)) for empty in (empty_downs, empty_ups))
        self.principal_A, self.principal_B = Down(downs, trained=False), Up(ups, trained=False)
        self.lora_dropout = dropout_of(dropout)

    def delta(self, x: Tensor) -> Tensor:
        """Returns the update of the layer's output."""
        x = self.lora_dropout(x)
        inner = torch.cat([self.shift_A(x), self.principal_A(x)], dim=-1)
        shift, principal = self.layer.reduce(inner * self.scale).chunk(2, dim=-1)
        update: Tensor = self.principal_B(shift) + self.shift_B(principal + shift)
        return update

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the weight with the update, fp32, this rank's shard."""
        parts = read(self.state_dict(), self.scale)
        return weight.float() + torch.cat([part.delta() for part in parts])

    def start(self, weight: Tensor, mesh: ProcessMesh, *, seed: int) -> None:
        """Sets A0 and B0; rank 0 decomposes the weight, so that all ranks have the same.

        Raises:
            ConfigError: The weight has fewer singular values than the rank.
        """
        key = f"{self.layer.name}.weight"
        whole = merge_shards(key, _gathered(weight))
        for index, rows in enumerate(whole.chunk(self.layer.parts)):
            _check_rank(self.layer.name, self.rank, min(rows.shape))
            found = None
            if mesh.rank == 0:
                found = _principal(rows.float(), self.rank, derive_seed(seed, f"pissa {key}", index))
            down, up = broadcast_object(mesh, found)
            for name, matrix in {"principal_A": down, "principal_B": up}.items():
                shard = shard_weight(
                    f"{self.layer.name}.{name}.{index}",
                    matrix / self.scale**0.5,
                    rank=mesh.model_rank,
                    size=mesh.model_size,
                )
                getattr(getattr(self, name), str(index)).copy_(shard)


def _gathered(weight: Tensor) -> list[Tensor]:
    """Returns the shards of a weight on all ranks of the model axis."""
    size = int(mpu.get_model_parallel_world_size())
    if size == 1:
        return [weight]
    shards = [torch.empty_like(weight) for _ in range(size)]
    dist.all_gather(shards, weight.contiguous(), group=mpu.get_model_parallel_group())
    return shards


def _principal(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns `sqrt(S) V^T` and `U sqrt(S)` of the largest singular values, fp32 on the CPU."""
    with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + _SPARE, *weight.shape), niter=_ITERATIONS)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:, :rank].T).cpu(), (u[:, :rank] * root).cpu()


def _check_rank(layer: str, rank: int, most: int) -> None:
    if rank > most:
        expected = (
            f"at most {most}, the singular values of {layer}; rank_pattern sets the rank of single layers"
        )
        raise ConfigError([Fault(f"{PARAMS_KEY}.r", str(rank), expected)])


def build(params: AdapterParams, layer: LinearShape) -> Pissa:
    """Builds the adapter of a layer."""
    rank, scale = params.rank_of(layer.name), params.scale_of(layer.name)
    return Pissa(layer, rank=rank, scale=scale, dropout=params.dropout)


def read(tensors: Mapping[str, Tensor], scale: float) -> tuple[LowRank, ...]:
    """Returns the update of each part, of rank 2r, given the saved tensors of a layer's adapter."""
    return tuple(_read_part(tensors, index, scale) for index in range(len(tensors) // 4))


def _read_part(tensors: Mapping[str, Tensor], index: int, scale: float) -> LowRank:
    names = ("shift_A", "shift_B", "principal_A", "principal_B")
    a, b, a0, b0 = (tensors[f"{name}.{index}"].float() for name in names)
    return LowRank(torch.cat([a, a0 + a]), torch.cat([b0, b], dim=1), scale)
