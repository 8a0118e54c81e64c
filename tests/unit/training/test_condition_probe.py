"""Which condition a held-out clip gets instead of its own, and what the losses say about it."""

import logging

import pytest
import torch

from sat_train.config.run_warnings import RunWarnings
from sat_train.data.batches import DataPosition, OrderedBatches
from sat_train.data.partners import PartnerBatches
from sat_train.training.callbacks.alignment import alignment_gains
from sat_train.training.callbacks.condition_check import ConditionCheck
from sat_train.training.callbacks.condition_probe import MOVES, moved_encoding
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.condition_losses import ConditionLosses
from sat_train.training.loop.metrics import ValidationMetrics


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_partners_are_a_derangement_of_each_bucket_whatever_the_ranks(ranks) -> None:
    def bucket(index: int) -> int:
        return index % 3

    partners = {}
    for rank in range(ranks):
        batches = OrderedBatches([2] * 3, bucket_of=bucket, rank=rank, num_ranks=ranks, stop=13)
        swapped = PartnerBatches(batches, bucket)
        pairs = zip(batches.micro_batches(DataPosition()), swapped.micro_batches(DataPosition()), strict=True)
        for own, other in pairs:
            partners |= dict(zip(own.mine, other.mine, strict=True))
    counted = {index: other for index, other in partners.items() if index < 13}
    assert sorted(counted) == sorted(counted.values()) == list(range(13))
    assert all(index != other and bucket(index) == bucket(other) for index, other in counted.items())
    assert all(bucket(index) == bucket(other) for index, other in partners.items()), "those that fill up, too"
    single = PartnerBatches(OrderedBatches([1] * 3, bucket_of=bucket, stop=13), bucket)
    assert {index: single.partner(index) for index in range(13)} == counted


def test_what_lies_on_the_grid_of_the_clip_moves_and_nothing_else() -> None:
    grid = torch.arange(2 * 3 * 4 * 5 * 6.0).view(2, 3, 4, 5, 6)
    encoding = {"mean": grid, "levels": torch.arange(18.0).view(2, 9), "caption": torch.rand(2, 7, 8)}
    moved = {name: moved_encoding(encoding, move, (2, 3, 16, 5, 6)) for name, move in MOVES.items()}
    later, left = moved["a latent frame later"], moved["a latent pixel to the left"]
    assert torch.equal(later["mean"], grid[:, [0, 0, 1]])
    assert later["levels"][0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4], (
        "9 frames of the clip are 3 of the latent"
    )
    assert torch.equal(left["mean"], grid[..., [1, 2, 3, 4, 5, 5]])
    assert left["levels"] is encoding["levels"]
    assert all(each["caption"] is encoding["caption"] for each in moved.values())
    assert moved_encoding({"caption": encoding["caption"]}, MOVES["a latent frame later"], grid.shape) is None


def losses(**by_clip: float) -> ClipLosses:
    return ClipLosses((250, 750), {clip: (loss, loss) for clip, loss in by_clip.items()})


def shifted(by: list[float]) -> ClipLosses:
    return losses(**{f"clip{n}": 1.0 + n + each for n, each in enumerate(by)})


@pytest.mark.parametrize(
    ("shuffled", "moved", "says"),
    [
        ([0.5, 0.4, 0.6, 0.5, 0.5], [0.1] * 5, []),
        ([0.0] * 5, [0.0] * 5, ["is not used: the loss with another clip's is the same"]),
        ([0.1, -0.1, 0.1, -0.1, 0.05], [-0.5] * 5, ["is not used"]),
        ([-0.1, -0.1, -0.2, -0.1, -0.2], [0.1] * 5, ["is not used: the loss with another clip's is lower"]),
        ([0.5] * 5, [-0.1, -0.2, -0.1, -0.2, -0.1], ["is not aligned with the clip: moved later"]),
        ([0.5] * 5, [-0.1, 0.1, -0.1, 0.1, -0.1], []),
        ([0.5] * 5, [-0.001] * 5, []),  # less than a twentieth of what the condition is worth
        ([0.0, 0.0], [0.0, 0.0], []),  # too few clips to tell
    ],
)
def test_problems_are_named_where_the_intervals_leave_no_doubt(shuffled, moved, says) -> None:
    true = shifted([0.0] * len(shuffled))
    report = ConditionLosses(
        "control", true, shifted([0.7] * len(shuffled)), shifted(shuffled), {"later": shifted(moved)}
    )
    problems = [each for each in (report.unused(), report.misaligned()) if each is not None]
    assert len(problems) == len(says)
    for problem, expected in zip(problems, says, strict=True):
        assert expected in problem


def test_a_warning_says_how_it_is_silenced_and_is(monkeypatch) -> None:
    lines: list[str] = []
    logger = logging.getLogger("sat_train.config.run_warnings")
    monkeypatch.setattr(logger, "warning", lambda text, *words: lines.append(text % words))
    true, better = shifted([0.0] * 5), {"later": shifted([-0.1] * 5)}
    unused = ConditionLosses("first", true, true, true, {}, better)
    moved = ConditionLosses("second", true, true, shifted([0.5] * 5), better)
    metrics = ValidationMetrics(20, true, (unused, moved))
    ConditionCheck(21, RunWarnings()).reported(metrics)
    names = ["conditions_lie_where_clips_show_them", "conditions_are_used", "conditions_are_aligned"]
    assert len(lines) == 1
    ConditionCheck(20, RunWarnings()).reported(metrics)
    for line, name in zip(lines[1:], names, strict=True):
        assert line.endswith(f"(args.silence=[{name}] hides this)")
    ConditionCheck(20, RunWarnings(names[1:])).reported(metrics)
    assert lines[4:] == lines[:1], "the one that is not silenced"


@pytest.mark.parametrize(
    ("planted", "best"),
    [
        ((0, 0, 0), ""),
        ((1, 0, 0), "earlier"),
        ((0, -1, 0), "down"),
        ((0, 0, 1), "to the left"),
    ],
)
def test_a_control_in_another_code_is_found_where_it_was_moved_to(planted, best) -> None:
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(6, 7, 4, 8, 9, generator=generator).cumsum(dim=3)
    coded = torch.einsum("btchw,kc->btkhw", clip, torch.randn(3, 4, generator=generator))
    encoding = {"mean": coded.roll(planted, dims=(1, 3, 4)), "logvar": torch.zeros_like(coded)}
    gains = alignment_gains(clip, encoding)
    numbers = {
        move: ClipLosses((0,), {f"clip{n}": (gain,) for n, gain in enumerate(gains_b.tolist())})
        for move, gains_b in gains.items()
    }
    true, other = shifted([0.0] * 6), shifted([0.5] * 6)
    report = ConditionLosses("control", true, other, other, {}, numbers)
    assert alignment_gains(clip, {"text": torch.rand(6, 7, 4)}) == {}, "what has no place on the grid"
    found = report.misplaced() or ""
    assert f"moved {best} by one place" in found if best else not found
