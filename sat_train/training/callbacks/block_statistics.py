"""Gradient norm and update-to-weight ratio of each block of the transformer."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from sat_train.config.parts.callback_parts import BlockStatisticsParams
from sat_train.distributed.collectives import sum_over_ranks
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import BlockMetrics

_BLOCK = re.compile(r"(?:^|\.)(?:layers|adaLN_modulations|per_block|\w+_list)\.(\d+)\.")


class BlockStatistics(Callback):
    """Reports, every `interval` steps, the norms of gradient, update and weights by block.

    A healthy ratio of update to weights is near 1e-3; far below, a block hardly learns, and far above, it
    forgets. On the steps between it does nothing; on its own it holds one copy of this rank's masters.

    Args:
        mesh: The process mesh.
        interval: Steps between reports.
    """

    def __init__(self, mesh: ProcessMesh, interval: int) -> None:
        self._mesh, self._interval = mesh, interval
        self._gradients: dict[str, Tensor] = {}
        self._before: list[Tensor] = []

    def before_optimizer_step(self, trainer: Training) -> None:
        """Adds up the gradients by block and copies the masters, if this step is reported."""
        if (trainer.state.step + 1) % self._interval:
            return
        counts = self._mesh.data_rank == 0  # every rank of the data axis sees the same gradients
        squares = ((name, _square(gradient) * counts) for name, gradient in trainer.engine.gradients())
        self._gradients = self._by_block(trainer, squares)
        self._before = [master.clone() for master in trainer.engine.masters()]

    def step_done(self, trainer: Training) -> None:
        """Reports the norms of a step that updated the weights."""
        before, self._before = self._before, []
        gradients, self._gradients = self._gradients, {}
        if not gradients or not trainer.applied:
            return
        names = [slot.name for slot in trainer.engine.slots]
        after = trainer.engine.masters()
        updates = (_square(new - old) for new, old in zip(after, before, strict=True))
        update_by_block = self._by_block(trainer, zip(names, updates, strict=True))
        weight_by_block = self._by_block(trainer, zip(names, map(_square, before), strict=True))
        norms = self._norms(trainer, [gradients, update_by_block, weight_by_block])
        grad_norms = {block: gradient for block, (gradient, _, _) in norms.items()}
        ratios = {block: update / weight for block, (_, update, weight) in norms.items() if weight}
        trainer.report(BlockMetrics(trainer.state.step, grad_norms, ratios))

    def _by_block(self, trainer: Training, squares: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Adds up this rank's squares; a weight that all ranks of the model axis hold counts once."""
        sharded = {name for name, p in trainer.engine.module.named_parameters() if _is_sharded(p)}
        sums: dict[str, Tensor] = {}
        for name, square in squares:
            share = square if name in sharded else square / self._mesh.model_size
            sums[block_of(name)] = sums.get(block_of(name), 0) + share.to(self._mesh.device)
        return sums

    def _norms(self, trainer: Training, parts: list[dict[str, Tensor]]) -> dict[str, list[float]]:
        """Returns the norms over all ranks by block. Ranks: all."""
        blocks = sorted({block_of(name) for name in trainer.engine.trained_shapes()})
        zero = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        squares = torch.stack([torch.stack([sums.get(block, zero) for sums in parts]) for block in blocks])
        norms = sum_over_ranks(self._mesh, squares).sqrt().tolist()
        return dict(zip(blocks, norms, strict=True))


def block_of(name: str) -> str:
    """Returns the block of a parameter, such as `block_07`, or the module that it lies in outside of them."""
    if match := _BLOCK.search(name):
        return f"block_{int(match[1]):02d}"
    parts = name.split(".")
    return parts[1] if parts[0] in ("mixins", "transformer") and len(parts) > 1 else parts[0]


def _square(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _is_sharded(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "model_parallel", False))


def build(params: BlockStatisticsParams, context: CallbackContext) -> BlockStatistics:
    """Builds the callback of a run."""
    return BlockStatistics(context.mesh, params.interval)
