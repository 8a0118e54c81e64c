"""Counts what a compiled block keeps, on the meta device.

Dynamo, AOTAutograd and its partitioner decide it, and run as they do before a compilation; Inductor, which
writes the code, does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.recompute import recompute_elementwise, recomputing


def count_compiled_bytes(block: DitBlock, x_bld: Tensor, context: BlockContext) -> int:
    """Returns the bytes that a compiled block without recomputation keeps, with its input.

    Weights, and what blocks have in common, are not counted.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    forwards: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        forwards.append(graph)
        return graph.forward

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, _: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    recompute_elementwise()
    torch._dynamo.reset()
    y_bld = torch.compile(recomputing, backend=backend, dynamic=False)(block, x_bld, context, recompute="off")
    torch._dynamo.reset()
    return _saved_bytes(forwards[0], like=x_bld) if y_bld.requires_grad else 0


def _saved_bytes(forward: fx.GraphModule, *, like: Tensor) -> int:
    output = next(node for node in forward.graph.nodes if node.op == "output")
    saved, storages = output.args[0][1:], {}
    for node in saved:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor) or (node.op == "placeholder" and value.shape != like.shape):
            continue
        storage = value.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
