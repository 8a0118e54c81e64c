"""The weight average is the average of the master weights, whoever holds which part of them."""

import pytest
import torch

from sat_train.distributed.processes import ProcessGrid
from sat_train.training.ema import WeightAverage, master_fragments
from tests.ranks.toy import build_toy, toy_run

pytestmark = pytest.mark.ranks

DECAY = 0.7


def _parts(engine, grid: ProcessGrid) -> dict[tuple[str, int], torch.Tensor]:
    return {(f.name, f.offset): f.master.float().clone() for f in master_fragments(engine, grid)}


def _average_three_steps(grid: ProcessGrid, options: dict) -> dict:
    """Trains three steps; returns this rank's average and the one computed from the masters by hand."""
    engine, stepper, _ = build_toy(grid, toy_run(**options))
    shapes = {
        n: tuple(getattr(p, "ds_shape", p.shape))
        for n, p in engine.module.named_parameters()
        if p.requires_grad
    }
    average = WeightAverage(engine, grid, DECAY)
    expected = _parts(engine, grid)
    for number in (1, 2, 3):
        stepper.step(number, 0.1)
        average.update()
        now = _parts(engine, grid)
        expected = {place: DECAY * old + (1 - DECAY) * now[place] for place, old in expected.items()}
    state = average.state_dict()
    fresh = WeightAverage(engine, grid, DECAY)
    fresh.load_state_dict(state)
    return {
        "shapes": shapes,
        "state": state,
        "expected": expected,
        "again": fresh.state_dict(),
        "masters": now,
    }


def _whole(results: list[dict], values: dict[tuple[str, int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts the parts of all ranks together; each element must be there exactly once."""
    whole = {}
    for name, shape in results[0]["shapes"].items():
        parts = sorted((offset, part) for (owner, offset), part in values.items() if owner == name)
        end = 0
        for offset, part in parts:
            assert offset == end, f"{name}: a part begins at {offset}, the one before ends at {end}"
            end += part.numel()
        whole[name] = torch.cat([part for _, part in parts]).view(shape)
    return whole


def _merged(results: list[dict], key: str) -> dict[str, torch.Tensor]:
    return _whole(results, {place: part for result in results for place, part in result[key].items()})


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_it_is_the_average_of_the_masters_and_the_parts_make_the_whole(
    rank_pool, zero_stage, precision, world_size
):
    options = {"batch_size": 4 // world_size, "zero_stage": zero_stage, "precision": precision}
    results = rank_pool(world_size)(_average_three_steps, options)
    for result in results:
        parts = {(f["name"], f["offset"]): f["values"] for f in result["state"]["fragments"]}
        again = {(f["name"], f["offset"]): f["values"] for f in result["again"]["fragments"]}
        assert parts.keys() == again.keys() == result["expected"].keys()
        assert all(torch.equal(parts[place], again[place]) for place in parts)
        result["average"] = parts
    average, expected, masters = (_merged(results, key) for key in ("average", "expected", "masters"))
    assert set(average) == {"0.weight", "0.bias", "2.weight", "2.bias"}  # the frozen matrix is not averaged
    for name, values in average.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(values, masters[name])
