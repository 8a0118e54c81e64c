"""Loads weights into the ranks of a run, each tensor read from disk by one rank of the data axis only."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat_train.distributed.collectives import check_all_ranks, wait_for_ranks
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import SatTrainError
from sat_train.interchange.locate import check_weights, copy_weights
from sat_train.weights.lazy import LazyWeights


@torch.no_grad()
def load_weights_once(
    module: nn.Module, weights: LazyWeights, mesh: ProcessMesh, *, may_lack: Collection[str] = ()
) -> None:
    """Copies weights into a module as `load_weights` does, on all ranks.

    The ranks of the data axis take turns in reading, tensor by tensor, and send what they have read to the
    others: the disk gives every byte once for each rank of the model axis, not once for each rank.

    Args:
        module: Module whose parameters and buffers are filled.
        weights: For this rank's shard; under the same names on all ranks of the data axis.
        mesh: The process mesh.
        may_lack: As for `load_weights`.

    Raises:
        SatTrainError: On all ranks alike: as `load_weights`, or a tensor cannot be read.

    Ranks: all.
    """
    check_weights(module, weights, may_lack=may_lack)
    names, error = sorted(weights), None
    try:
        copy_weights(module, weights, names[mesh.data_rank :: mesh.data_size])
    except SatTrainError as problem:
        error = problem
    wait_for_ranks(mesh)
    check_all_ranks(mesh, error)
    if mesh.data_size > 1:
        targets = module.state_dict()
        for number, name in enumerate(names):
            _broadcast(targets[name], mesh, number % mesh.data_size)


def _broadcast(tensor: Tensor, mesh: ProcessMesh, data_rank: int) -> None:
    """Sends the bytes of a tensor from one rank of the data axis to the others, in place.

    A tensor in host memory goes over the device, because NCCL sends from there alone.
    """
    source = data_rank * mesh.model_size + mesh.model_rank
    whole = tensor.to(mesh.device).contiguous()
    dist.broadcast(whole.view(-1).view(torch.uint8), source, group=mesh.data_group)
    if whole is not tensor:
        tensor.copy_(whole)
