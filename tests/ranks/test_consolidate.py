"""The whole weights that are put together from a step are those that DeepSpeed trained, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_train.checkpoint.consolidate import read_step, trained_dtype
from sat_train.checkpoint.manifest import verify_checkpoint
from sat_train.distributed.processes import ProcessMesh
from tests.ranks.test_checkpoint import CASES, build_engine, new_run, save, train

pytestmark = pytest.mark.ranks


def _trained_masters(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if engine.zero_stage == 0:
        return {name: parameter.detach().clone() for name, parameter in trained}
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained}


def _consolidated_is_what_was_trained(
    mesh: ProcessMesh, root: Path, zero_stage: int, dtype: str, exclude_frozen: bool
) -> None:
    from sat_train.training.callbacks.ema import ExponentialMovingAverage

    run_directory = new_run(mesh, root / f"{zero_stage}-{dtype}-{exclude_frozen}")
    engine = build_engine(mesh, zero_stage=zero_stage, dtype=dtype, lora=True)
    average = ExponentialMovingAverage(engine, 0.5)
    before = _trained_masters(engine)
    train(engine, mesh.rank, range(1))
    average.update()
    masters = _trained_masters(engine)
    folder = save(mesh, engine, run_directory, step=1, lora=exclude_frozen, average=average)

    manifest = verify_checkpoint(folder)
    weights = read_step(folder, manifest)
    assert trained_dtype(manifest) == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    # the frozen ones, which zero_to_fp32 loses at stage 1
    frozen = set() if exclude_frozen else {"0.weight", "2.bias"}
    assert weights.keys() == masters.keys() | frozen | {"table"}
    assert torch.equal(weights["table"], torch.arange(3.0))
    for name, master in masters.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], master), name
    if frozen:
        torch.manual_seed(0)
        assert torch.equal(
            weights["0.weight"].float(), torch.nn.Linear(8, 16).weight.to(weights["0.weight"].dtype).float()
        )

    averages = read_step(folder, manifest, ema=True)
    for name, master in masters.items():
        torch.testing.assert_close(averages[name], (before[name] + master) / 2, rtol=1e-6, atol=1e-8)
        assert not torch.equal(averages[name], master)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_consolidated_weights_are_the_trained_ones(
    rank_pool: Callable[..., Any], tmp_path: Path, world_size: int
) -> None:
    few = [case for case in CASES if case[1:] == ("bf16", False)]  # uneven partitions, nothing else is new
    for zero_stage, dtype, exclude_frozen in CASES if world_size < 3 else few:
        rank_pool(world_size)(_consolidated_is_what_was_trained, tmp_path, zero_stage, dtype, exclude_frozen)
