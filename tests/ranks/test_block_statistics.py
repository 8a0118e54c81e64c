"""Norms by block: those of plain torch, at every ZeRO stage and on any mesh."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sat_train.distributed.processes import ProcessMesh
from sat_train.training.callbacks.block_statistics import BlockStatistics, block_of
from sat_train.training.loop.callback import Callback
from sat_train.training.loop.meter import Meter
from sat_train.training.loop.metrics import BlockMetrics
from sat_train.training.loop.state import TrainState
from sat_train.training.loop.trainer import Trainer
from tests.ranks.toy import CONSTANT, build_toy, toy_batches, toy_model, toy_run

BATCH = 2


class Heard(Callback):
    """Collects the reports of blocks."""

    def __init__(self) -> None:
        self.reports: list[BlockMetrics] = []

    def reported(self, metrics) -> None:
        if isinstance(metrics, BlockMetrics):
            self.reports.append(metrics)


def _statistics(mesh: ProcessMesh, zero_stage: int) -> list[BlockMetrics]:
    config = toy_run(batch_size=BATCH, accumulation=2, zero_stage=zero_stage, clip_grad=0.0)
    _, train_step, _ = build_toy(mesh, config)
    heard = Heard()
    trainer = Trainer(
        train_step=train_step,
        meter=Meter(mesh),
        learning_rate=CONSTANT,
        train_iters=4,
        log_interval=10,
        state=TrainState(),
        callbacks=[BlockStatistics(mesh, interval=2), heard],
    )
    trainer.run()
    return heard.reports


def _plain(ranks: int) -> list[BlockMetrics]:
    """The same by torch alone: one process, all samples in one batch."""
    model = toy_model()
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    batches, reports = toy_batches(SimpleNamespace(data_rank=0, data_size=1), BATCH * 2 * ranks), []
    for step in range(1, 5):
        batch = next(batches)
        optimizer.zero_grad()
        (model(batch.inputs) - batch.targets).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        updates = {name: dict(model.named_parameters())[name].detach() - old for name, old in before.items()}
        if step % 2 == 0:
            norms = [_norms(each) for each in (gradients, updates, before)]
            ratios = {block: norms[1][block] / norms[2][block] for block in norms[0]}
            reports.append(BlockMetrics(step, norms[0], ratios))
    return reports


def _norms(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        squares[block_of(name)] = squares.get(block_of(name), 0.0) + float(tensor.double().square().sum())
    return {block: math.sqrt(total) for block, total in squares.items()}


@pytest.mark.ranks
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_norms_by_block_are_those_of_plain_torch_on_every_rank(rank_pool, zero_stage):
    expected = _plain(2)
    for reports in rank_pool(2)(_statistics, zero_stage):
        assert [report.step for report in reports] == [2, 4]
        for found, plain in zip(reports, expected, strict=True):
            assert found.grad_norm_by_block.keys() == found.update_ratio_by_block.keys() == {"0", "2"}
            # sums in another order, and Adam divides by the root of small gradients
            assert found.grad_norm_by_block == pytest.approx(plain.grad_norm_by_block, rel=1e-4)
            assert found.update_ratio_by_block == pytest.approx(plain.update_ratio_by_block, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer.layers.3.attention.query_key_value.weight", "block_03"),
        ("mixins.adaln_layer.adaLN_modulations.11.1.weight", "block_11"),
        ("mixins.adaln_layer.query_layernorm_list.0.weight", "block_00"),
        ("mixins.brightness.per_block.7.weight", "block_07"),
        ("mixins.final_layer.adaLN_modulation.1.weight", "final_layer"),
        ("transformer.final_layernorm.weight", "final_layernorm"),
        ("time_embed.0.weight", "time_embed"),
    ],
)
def test_each_parameter_belongs_to_its_block_or_module(name, block):
    assert block_of(name) == block
