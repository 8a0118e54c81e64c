"""The weight average is the average of the master weights, whoever holds which part of them."""

import pytest
import torch

from sat_train.checkpoint.fragments import AVERAGE, MASTER, SavedFragments
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.training.callbacks.ema import ExponentialMovingAverage
from tests.ranks.toy import build_toy, toy_run

pytestmark = pytest.mark.ranks

DECAY = 0.7


def _average_three_steps(mesh: ProcessMesh, options: dict) -> tuple[list, list[list[torch.Tensor]]]:
    """Trains three steps; returns this rank's fragments, and its masters before and after each step."""
    engine, train_step, _ = build_toy(mesh, toy_run(**options))
    average = ExponentialMovingAverage(engine, DECAY)
    masters = [[master.float().clone() for master in engine.masters()]]
    for number in (1, 2, 3):
        train_step.step(number, 0.1)
        average.update()
        masters.append([master.float().clone() for master in engine.masters()])
    return average.add_tensors(engine.fragments()), masters


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_it_is_the_average_of_the_masters_and_the_parts_make_the_whole(
    rank_pool, zero_stage, precision, world_size
):
    options = {"batch_size": 4 // world_size, "zero_stage": zero_stage, "precision": precision}
    results = rank_pool(world_size)(_average_three_steps, options)
    for fragments, (first, *others) in results:
        expected = first
        for masters in others:
            expected = [DECAY * old + (1 - DECAY) * new for old, new in zip(expected, masters, strict=True)]
        for fragment, values in zip(fragments, expected, strict=True):
            torch.testing.assert_close(fragment.tensors[AVERAGE], values, rtol=1e-6, atol=1e-7)
    saved = SavedFragments([[each for fragments, _ in results for each in fragments]], where="memory")
    average, masters = saved.whole(AVERAGE), saved.whole(MASTER)
    # the frozen matrix is not averaged
    assert average.keys() == masters.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not any(torch.equal(average[name], masters[name]) for name in average)


def _load_without_average(mesh: ProcessMesh) -> str:
    engine, _, _ = build_toy(mesh, toy_run(batch_size=2))
    saved = SavedFragments([engine.fragments()], where="step 3")
    with pytest.raises(CheckpointError) as caught:
        ExponentialMovingAverage(engine, DECAY).load_tensors(saved)
    return str(caught.value)


def test_a_checkpoint_without_an_average_is_refused(rank_pool):
    (message,) = rank_pool(1)(_load_without_average)
    assert "step 3 holds no average of 0.weight" in message
