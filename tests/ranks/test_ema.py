"""The weight average is the average of the master weights, whoever holds which part of them."""

import pytest
import torch

from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.training.ema import ExponentialMovingAverage, master_fragments
from tests.ranks.toy import build_toy, toy_run

pytestmark = pytest.mark.ranks

DECAY = 0.7


def _parts(engine, mesh: ProcessMesh) -> dict[tuple[str, int], torch.Tensor]:
    return {(f.name, f.offset): f.master.float().clone() for f in master_fragments(engine, mesh)}


def _average_three_steps(mesh: ProcessMesh, options: dict) -> dict:
    """Trains three steps; returns this rank's average and the one computed from the masters by hand."""
    engine, train_step, _ = build_toy(mesh, toy_run(**options))
    shapes = {
        n: tuple(getattr(p, "ds_shape", p.shape))
        for n, p in engine.module.named_parameters()
        if p.requires_grad
    }
    average = ExponentialMovingAverage(engine, mesh, DECAY)
    expected = _parts(engine, mesh)
    for number in (1, 2, 3):
        train_step.step(number, 0.1)
        average.update()
        now = _parts(engine, mesh)
        expected = {place: DECAY * old + (1 - DECAY) * now[place] for place, old in expected.items()}
    state = average.state_dict()
    fresh = ExponentialMovingAverage(engine, mesh, DECAY)
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


def _load(mesh: ProcessMesh, options: dict, state: dict) -> dict:
    engine, _, _ = build_toy(mesh, toy_run(**options))
    average = ExponentialMovingAverage(engine, mesh, DECAY)
    average.load_state_dict(state)
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}
    return {"shapes": shapes, "state": average.state_dict()}


def _parts_of(results: list[dict]) -> dict[tuple[str, int], torch.Tensor]:
    fragments = [fragment for result in results for fragment in result["state"]["fragments"]]
    return {(fragment["name"], fragment["offset"]): fragment["values"] for fragment in fragments}


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_takes_the_average_over(rank_pool, zero_stage, before, after):
    results = rank_pool(before)(_average_three_steps, {"batch_size": 4 // before, "zero_stage": zero_stage})
    fragments = [fragment for result in results for fragment in result["state"]["fragments"]]
    state = {"decay": DECAY, "fragments": fragments}
    again = rank_pool(after)(_load, {"batch_size": 4 // after, "zero_stage": zero_stage}, state)
    first, second = _whole(results, _parts_of(results)), _whole(results, _parts_of(again))
    for name, values in first.items():
        assert torch.equal(values, second[name])


def _load_half(mesh: ProcessMesh, state: dict) -> str:
    with pytest.raises(CheckpointError) as caught:
        _load(mesh, {"batch_size": 2}, state)
    return str(caught.value)


def test_an_average_that_lacks_elements_or_has_strange_ones_is_refused(rank_pool):
    (result,) = rank_pool(1)(_average_three_steps, {"batch_size": 4})
    fragments = result["state"]["fragments"]
    half = [{**fragments[0], "values": fragments[0]["values"][:-3]}, *fragments[1:]]
    (lacking,) = rank_pool(1)(_load_half, {"decay": DECAY, "fragments": half})
    assert "elements of 0.weight from 0 on" in lacking
    strange = [*fragments, {"name": "strange.weight", "offset": 0, "values": torch.zeros(2)}]
    (refused,) = rank_pool(1)(_load_half, {"decay": DECAY, "fragments": strange})
    assert "parts of other parameters: ['strange.weight']" in refused
