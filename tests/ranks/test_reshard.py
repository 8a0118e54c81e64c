"""A run resumes with another number of ranks: every value arrives, and there and back changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_train.distributed.processes import ProcessMesh
from tests.ranks.test_checkpoint import build_engine, load, new_run, save, train

pytestmark = pytest.mark.ranks

Case = tuple[int, str, bool]
# ZeRO stage, precision, LoRA; by the number of ranks in between
CASES: dict[int, list[Case]] = {
    1: [(0, "fp32", False), (1, "bf16", True), (2, "fp32", False), (3, "bf16", True), (3, "fp32", False)],
    3: [(2, "bf16", True), (3, "bf16", False)],
}


def _engine(case: Case, seed: int = 0) -> Any:
    zero_stage, dtype, lora = case
    return build_engine(zero_stage=zero_stage, dtype=dtype, lora=lora, seed=seed)


def _masters(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 weights of every trained parameter, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    whole = (lambda p: p.detach()) if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param
    return {name: whole(parameter).clone() for name, parameter in trained.items()}


def _start(mesh: ProcessMesh, root: Path, case: Case) -> tuple[dict[str, torch.Tensor], list[float]]:
    from sat_train.training.ema import ExponentialMovingAverage

    engine = _engine(case)
    average = ExponentialMovingAverage(engine, mesh, 0.9)
    train(engine, mesh.rank, range(3))
    average.update()
    save(mesh, engine, new_run(mesh, root), step=3, lora=case[2], ema_state=average.state_dict())
    return _masters(engine), train(engine, mesh.rank, range(3, 6))


def _move(mesh: ProcessMesh, source: Path, dest: Path, case: Case) -> dict[str, torch.Tensor]:
    """Loads with these ranks and saves at once."""
    from sat_train.training.ema import ExponentialMovingAverage

    engine = _engine(case, seed=0 if case[2] else 1)
    average = ExponentialMovingAverage(engine, mesh, 0.9)
    state = load(mesh, engine, source)
    average.load_state_dict(state.ema_state)
    assert (state.step, engine.global_steps) == (3, 3)
    save(mesh, engine, new_run(mesh, dest), step=3, lora=case[2], ema_state=average.state_dict())
    return _masters(engine)


def _go_on(mesh: ProcessMesh, source: Path, case: Case) -> list[float]:
    engine = _engine(case, seed=0 if case[2] else 1)
    load(mesh, engine, source)
    return train(engine, mesh.rank, range(3, 6))


def _go_on_alone(mesh: ProcessMesh, source: Path, case: Case) -> list[float]:
    """One rank takes the samples of both."""
    engine = _engine(case, seed=1)
    load(mesh, engine, source)
    losses = []
    for step in range(3, 6):
        draw = [torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(2)]
        loss = engine(torch.cat(draw)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("between", [1, 3])
def test_there_and_back_is_bit_exact(rank_pool: Callable[..., Any], tmp_path: Path, between: int) -> None:
    from sat_train.checkpoint.consolidate import read_step
    from sat_train.checkpoint.find import newest_verified

    for case in CASES[between]:
        root = tmp_path / "-".join(map(str, case))
        started = rank_pool(2)(_start, root / "a", case)
        moved = rank_pool(between)(_move, root / "a", root / "b", case)
        for state in moved:
            assert state.keys() == started[0][0].keys()
            for key, value in started[0][0].items():
                assert torch.equal(state[key], value), (case, key)
        rank_pool(2)(_move, root / "b", root / "c", case)
        assert rank_pool(2)(_go_on, root / "c", case) == [losses for _, losses in started], case

        points = [newest_verified(root / name / "exp-20260101-000000") for name in "abc"]
        averages = [read_step(p.run_directory / "3", p.manifest, ema=True) for p in points if p is not None]
        for other in averages[1:]:
            assert all(torch.equal(other[key], averages[0][key]) for key in averages[0])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_rank_goes_on_as_two_would(
    rank_pool: Callable[..., Any], tmp_path: Path, zero_stage: int
) -> None:
    case = (zero_stage, "fp32", False)
    (_, first), (_, second) = rank_pool(2)(_start, tmp_path, case)
    both = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    alone = rank_pool(1)(_go_on_alone, tmp_path, case)[0]
    # fp32 sums in another order; wrong moments would move a step by its own size, 1e-2
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(both), rtol=1e-5, atol=1e-7)
