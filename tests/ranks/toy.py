"""A small regression model in place of the DiT, so that tests of the loop need no video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sat_train.config import ArgsConfig, DeepSpeedConfig
from sat_train.config.learning_rate import LearningRate
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.seeds import derive_generator
from sat_train.distributed.signals import StopRequest
from sat_train.engine.build import build_engine
from sat_train.engine.engine import TrainEngine
from sat_train.training.loop.step import TrainStep

WIDTH = 6


@dataclass(frozen=True)
class ToyBatch:
    inputs: torch.Tensor
    targets: torch.Tensor
    clip_ids: tuple[str, ...]


def toy_model() -> nn.Module:
    """Two matrices, two biases and a frozen matrix."""
    model = nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
    )
    generator = derive_generator(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model[3].weight.requires_grad_(False)
    return model


def toy_run(
    *,
    batch_size: int,
    accumulation: int = 1,
    zero_stage: int = 1,
    precision: str = "fp32",
    lr: float = 1e-2,
    clip_grad: float = 0.5,
    zero: Mapping[str, Any] | None = None,
    **section: Any,
) -> Any:
    """The parts of a RunConfig that the engine reads, without a model section.

    Args:
        zero: More keys of `deepspeed.zero_optimization`.
        section: More keys of `deepspeed`.
    """
    args = ArgsConfig(
        zero_stage=zero_stage, fp16=precision == "fp16", bf16=precision == "bf16", batch_size=batch_size
    )
    deepspeed = DeepSpeedConfig.model_validate(
        {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_grad,
            "zero_optimization": {"stage": zero_stage, **(zero or {})},
            "fp16": {"enabled": precision == "fp16"},
            "bf16": {"enabled": precision == "bf16"},
            "optimizer": {"params": {"lr": lr, "weight_decay": 0.01}},
            **section,
        }
    )
    model, spec = SimpleNamespace(train={}), SimpleNamespace(adapter=None)
    return SimpleNamespace(args=args, deepspeed=deepspeed, model=model, spec=spec, data=None, sources={})


def toy_batches(
    mesh: ProcessMesh, batch_size: int, *, poison: int = -1, start: int = 0
) -> Iterator[ToyBatch]:
    """Sample `i` is a function of `i`; each global micro-batch is dealt over the data axis.

    Args:
        poison: Global index of a sample whose target is NaN.
        start: Samples already consumed.
    """
    position = start
    while True:
        indices = [position + mesh.data_rank * batch_size + i for i in range(batch_size)]
        inputs = torch.stack(
            [torch.randn(WIDTH, generator=derive_generator(1, "x", i % 24)) for i in indices]
        )
        targets = inputs.flip(1) * 2
        for row, index in enumerate(indices):
            if index == poison:
                targets[row] = float("nan")
        yield ToyBatch(inputs, targets, tuple(f"clip{i}" for i in indices))
        position += batch_size * mesh.data_size


def build_toy(
    mesh: ProcessMesh, config: Any, *, poison: int = -1, start: int = 0, is_saving: bool = False
) -> tuple[TrainEngine, TrainStep, StopRequest]:
    """Returns an engine over the toy model, a train_step over its batches, and its stop request."""
    model = toy_model()
    engine = build_engine(config, model, mesh)
    dtype = next(model.parameters()).dtype

    def compute_loss(batch: ToyBatch) -> torch.Tensor:
        return (engine(batch.inputs.to(dtype)).float() - batch.targets).square().mean()

    stop_request = StopRequest()
    train_step = TrainStep(
        engine=engine,
        compute_loss=compute_loss,
        batches=toy_batches(mesh, config.args.batch_size, poison=poison, start=start),
        mesh=mesh,
        stop_request=stop_request,
        is_saving=lambda: is_saving,
    )
    return engine, train_step, stop_request


def frozen_names(module: nn.Module) -> set[str]:
    """Returns the names of the frozen parameters."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


CONSTANT = LearningRate(peak=1e-2, warmup_steps=0, style="constant", decay_end=100, floor_ratio=0.0)
