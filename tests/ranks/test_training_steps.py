"""Laws of the optimizer step: stages, accumulation, world size, and what is not finite."""

import itertools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import TrainingError
from sat_train.testing.pool import FailedOnRank
from tests.ranks.toy import build_toy, toy_batches, toy_model, toy_run

pytestmark = pytest.mark.ranks

STEPS = 6
# Sums over other groupings of the same fp32 numbers, amplified by Adam's division by small moments.
TOLERANCE = 2e-5


def _losses(mesh: ProcessMesh, options: dict, steps: int = STEPS) -> tuple[list[float], list[float]]:
    _, train_step, _ = build_toy(mesh, toy_run(**options))
    losses, norms = [], []
    for number in range(1, steps + 1):
        result = train_step.step(number, 1e-2)
        losses.append(float(sum_over_data(mesh, result.loss.clone())) / mesh.data_size)
        norms.append(result.grad_norm)
    return losses, norms


@pytest.fixture(scope="module")
def reference():
    """Losses and gradient norms of one process at ZeRO-1 with the whole batch at once."""
    return {}


def _reference(reference: dict, rank_pool) -> tuple[list[float], list[float]]:
    if not reference:
        reference["result"] = rank_pool(1)(_losses, {"batch_size": 8})[0]
    return reference["result"]


def test_training_lowers_the_loss(rank_pool, reference):
    losses, norms = _reference(reference, rank_pool)
    assert sum(losses[3:]) < sum(losses[:3])  # three steps of 8 are one pass over the 24 samples
    assert all(norm > 0 for norm in norms)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_stage_and_world_size_gives_the_same_losses_and_norms(
    rank_pool, reference, zero_stage, world_size
):
    losses, norms = _reference(reference, rank_pool)
    options = {"batch_size": 8 // world_size, "zero_stage": zero_stage}
    for result in rank_pool(world_size)(_losses, options):
        assert result[0] == pytest.approx(losses, rel=TOLERANCE)
        assert result[1] == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_accumulation_equals_one_big_batch(rank_pool, reference, zero_stage):
    losses, norms = _reference(reference, rank_pool)
    options = {"batch_size": 2, "accumulation": 2, "zero_stage": zero_stage}
    for result in rank_pool(2)(_losses, options):
        assert result[0] == pytest.approx(losses, rel=TOLERANCE)
        assert result[1] == pytest.approx(norms, rel=TOLERANCE)


WAYS = [  # of reducing gradients: one bucket or several, with a weight that is larger than a bucket
    (1, {"overlap_comm": True}),
    (2, {"overlap_comm": True, "reduce_bucket_size": 10}),
    (2, {"use_multi_rank_bucket_allreduce": False}),
    (2, {"reduce_scatter": False}),
    (3, {"reduce_scatter": False}),
]


@pytest.mark.parametrize(("zero_stage", "zero"), WAYS)
def test_the_way_in_which_gradients_are_reduced_changes_no_loss(rank_pool, reference, zero_stage, zero):
    losses, norms = _reference(reference, rank_pool)
    for result in rank_pool(2)(_losses, {"batch_size": 4, "zero_stage": zero_stage, "zero": zero}):
        assert result[0] == pytest.approx(losses, rel=TOLERANCE)
        assert result[1] == pytest.approx(norms, rel=TOLERANCE)


FP32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}


def _error_of_sums(mesh: ProcessMesh, zero_stage: int, section: dict) -> float:
    """Returns how far gradients of eight bf16 micro-steps on two ranks are from their mean in fp32."""
    options = {"batch_size": 2, "accumulation": 8, "precision": "bf16", "zero_stage": zero_stage}
    config = toy_run(**options, **section)
    engine, train_step, _ = build_toy(mesh, config)
    found: dict[str, torch.Tensor] = {}
    train_step.step(1, 1e-2, before_update=lambda: found.update(engine.gradients()))
    model, batches = toy_model().bfloat16(), toy_batches(mesh, config.args.batch_size)
    sums = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    for batch in itertools.islice(batches, 8):
        model.zero_grad()
        (model(batch.inputs.bfloat16()).float() - batch.targets).square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.float() / (8 * mesh.data_size)
    expected = {name: sum_over_data(mesh, tensor) for name, tensor in sums.items()}
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_gradients_of_half_precision_can_be_summed_in_fp32(rank_pool, zero_stage):
    fp32 = max(rank_pool(2)(_error_of_sums, zero_stage, FP32_SUMS))
    bf16 = max(rank_pool(2)(_error_of_sums, zero_stage, {}))
    assert fp32 < 1e-6  # scales are powers of two, so only the order of the sums differs
    assert bf16 > 1e-3  # eight bits of mantissa


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_follows_fp32(rank_pool, reference, zero_stage):
    losses, _ = _reference(reference, rank_pool)
    options = {"batch_size": 4, "zero_stage": zero_stage, "precision": "bf16"}
    # bf16 has 8 bits of mantissa: half a percent a number
    assert rank_pool(2)(_losses, options)[0][0] == pytest.approx(losses, rel=0.02)


def _poisoned(mesh: ProcessMesh, zero_stage: int) -> tuple[str, bool, bool]:
    """Sample 5 is in the second half of the first global micro-batch of 8: rank 1 alone has it."""
    engine, train_step, _ = build_toy(
        mesh, toy_run(batch_size=4, accumulation=2, zero_stage=zero_stage), poison=5
    )
    before = _weights(engine)
    with pytest.raises(TrainingError) as caught:
        train_step.step(1, 1e-2)
    return str(caught.value), torch.equal(before, _weights(engine)), caught.value.ranks_agree


def _weights(engine) -> torch.Tensor:
    if engine.zero_stage < 3:
        return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])
    return torch.cat([p.ds_tensor.detach().flatten().clone() for p in engine.module.parameters()])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(rank_pool, zero_stage):
    for message, untouched, agreed in rank_pool(2)(_poisoned, zero_stage):
        assert "step 1: the loss is not finite" in message
        assert "rank 1: loss nan on clip4, clip5, clip6, clip7" in message
        assert "rank 0" not in message
        assert untouched
        assert agreed


def _stopped(mesh: ProcessMesh) -> list[int]:
    _, train_step, stop_request = build_toy(mesh, toy_run(batch_size=2))
    first = train_step.step(1, 1e-2).stop_level
    stop_request.signal_name = "SIGINT" if mesh.rank == 1 else "SIGTERM"
    return [first, train_step.step(2, 1e-2).stop_level, train_step.stop_level()]


def test_all_ranks_stop_after_the_same_step_and_know_that_a_person_asked_one_of_them(rank_pool):
    assert rank_pool(2)(_stopped) == [[0, 2, 2]] * 2


def _overflowing(mesh: ProcessMesh, zero_stage: int) -> tuple[list[bool], bool]:
    """On rank 1 the second backward pass overflows though the loss is finite."""
    precision = "bf16" if zero_stage else "fp32"
    engine, train_step, _ = build_toy(mesh, toy_run(batch_size=4, precision=precision, zero_stage=zero_stage))
    weight = next(engine.module.parameters())
    results = []
    for number in (1, 2, 3):
        poison = number == 2 and mesh.rank == 1
        hook = weight.register_hook(
            lambda gradient, factor=float("inf") if poison else 1.0: gradient * factor
        )
        results.append(train_step.step(number, 1e-2).applied)
        hook.remove()
    return results, bool(_weights(engine).isfinite().all())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(rank_pool, zero_stage):
    assert rank_pool(2)(_overflowing, zero_stage) == [([True, False, True], True)] * 2


def _weights_at_the_notice(mesh: ProcessMesh, zero_stage: int) -> tuple[set[bool], bool]:
    """Returns whether the weights were those of the start at each notice of an update, and after it."""
    engine, train_step, _ = build_toy(mesh, toy_run(batch_size=2, accumulation=2, zero_stage=zero_stage))
    before, same = _weights(engine), set()
    engine.before_update = lambda: same.add(torch.equal(before, _weights(engine)))
    train_step.step(1, 1e-2)
    return same, torch.equal(before, _weights(engine))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_no_weight_changes_before_its_readers_have_been_waited_for(rank_pool, zero_stage):
    assert rank_pool(2)(_weights_at_the_notice, zero_stage) == [({True}, False)] * 2


class HostReads(TorchFunctionMode):
    """Counts the places at which the host reads a tensor of the device or copies a number to it, and waits.

    In host memory are tensors made of Python's numbers, and what is computed from such tensors alone.
    """

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0]
        self._in_host_memory: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_host = all(any(each is other for other in self._in_host_memory) for each in tensors)
        is_made, is_sent = function is torch.tensor, bool((kwargs or {}).get("device"))
        self.counts[-1] += not on_host and getattr(function, "__name__", "") in self.READS
        self.counts[-1] += is_made and is_sent
        is_filled = function is torch.Tensor.masked_fill_  # reads its value, where that is a tensor
        self.counts[-1] += is_filled and isinstance(args[2], torch.Tensor)
        result = function(*args, **(kwargs or {}))
        if on_host and (tensors or (is_made and not is_sent)) and isinstance(result, torch.Tensor):
            self._in_host_memory.append(result)
        return result

    def next_part(self) -> None:
        """Begins a new count."""
        self.counts.append(0)


def _reads(mesh: ProcessMesh, options: dict[str, Any]) -> list[list[int]]:
    """Reads in the parts of the third step, at 1 and 3 micro-steps; ZeRO-3 learns its order in the others.

    Returns:
        Reads up to the end of the last backward pass, and those after it.
    """
    counts = []
    for accumulation in (1, 3):
        _, train_step, _ = build_toy(mesh, toy_run(batch_size=1, accumulation=accumulation, **options))
        train_step.step(1, 1e-2)
        train_step.step(2, 1e-2)
        reads = HostReads()
        with reads:
            train_step.step(3, 1e-2, before_update=reads.next_part)
        counts.append(reads.counts)
    return counts


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "precision"),
    [(1, 1, "fp32"), (2, 0, "fp32"), (2, 1, "bf16"), (2, 2, "bf16"), (2, 3, "bf16")],
)
def test_a_step_waits_for_the_device_once_and_its_micro_steps_never(rank_pool, ranks, zero_stage, precision):
    options = {"zero_stage": zero_stage, "precision": precision}
    assert rank_pool(ranks)(_reads, options) == [[[0, 1], [0, 1]]] * ranks


def test_an_optimizer_that_estimates_its_rate_waits_once_more(rank_pool):
    optimizer = {"type": "Prodigy", "params": {"lr": 1.0}}
    options = {"zero_stage": 2, "precision": "bf16", "optimizer": optimizer}
    assert rank_pool(2)(_reads, options) == [[[0, 2], [0, 2]]] * 2


def _build_fp16(mesh: ProcessMesh) -> None:
    build_toy(mesh, toy_run(batch_size=4, precision="fp16", zero_stage=0))


def test_what_cannot_work_is_refused_at_once(rank_pool):
    with pytest.raises(FailedOnRank, match=r"2 faults(.|\n)*args.zero_stage = 0(.|\n)*args.fp16 = true"):
        rank_pool(1)(_build_fp16)
