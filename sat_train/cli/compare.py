"""`sat-train compare`: places a run in the band of a card, or compares two runs clip by clip."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from sat_train.errors import DataError
from sat_train.training.callbacks.validation_file import NAME, read_validations
from sat_train.training.expected_curve import ExpectedCurve, read_card
from sat_train.training.loop.clip_losses import ClipLosses, Estimate

Validations = Mapping[int, ClipLosses]


def main(argv: Sequence[str]) -> int:
    """Compares the validation losses of a run.

    Args:
        argv: The words after `sat-train compare`.

    Returns:
        0 where the run is as good or better at the last step that both have validated, 1 where it is worse.

    Raises:
        DataError: There is nothing to compare.
    """
    options = _parser().parse_args(argv)
    run = _validations(options.run)
    if options.other.is_dir():
        lines, is_worse = compare_runs(options.run, run, options.other, _validations(options.other))
    else:
        lines, is_worse = compare_with_card(options.run, run, read_card(options.other))
    print("\n".join(lines))
    return int(is_worse)


def compare_with_card(path: Path, run: Validations, card: ExpectedCurve) -> tuple[list[str], bool]:
    """Returns the table of a run and a card, and whether the run ends above the band.

    Raises:
        DataError: Clips, timesteps or steps differ.
    """
    steps = _shared_steps(path, run, f"the card of {card.recipe}", card.losses)
    card.check_comparable(run[steps[-1]], where=path)
    lines = [f"{path.name} and the card of {card.recipe}, {len(card.seeds)} seeds", ""]
    lines.append(f"{'step':>7}  {'loss':>9}  {'expected':>20}")
    place = ""
    for step in steps:
        loss, (low, high) = run[step].mean().mean, card.band(step)
        place = card.place(step, loss)
        lines.append(f"{step:>7}  {loss:9.5f}  {f'{low:.5f} to {high:.5f}':>20}  {place}")
    return lines, place == "above"


def compare_runs(
    path: Path, run: Validations, other_path: Path, other: Validations
) -> tuple[list[str], bool]:
    """Returns the table of two runs, and whether the first ends worse.

    Raises:
        DataError: Clips, timesteps or steps differ.
    """
    steps = _shared_steps(path, run, str(other_path), other)
    differences = {step: _paired(path, run[step], other_path, other[step]) for step in steps}
    last = differences[steps[-1]]
    lines = [f"{path.name} minus {other_path.name}, paired on {len(last)} clips, with 95 % intervals", ""]
    lines.append(f"{'step':>7}  {'loss':>9}  {'other':>9}  difference")
    for step, difference in differences.items():
        losses = f"{run[step].mean().mean:9.5f}  {other[step].mean().mean:9.5f}"
        lines.append(f"{step:>7}  {losses}  {_describe(difference.mean())}")
    lines += ["", f"at step {steps[-1]}, by timestep"]
    lines += [f"{timestep:>7}  {_describe(at)}" for timestep, at in last.by_timestep().items()]
    return lines, last.mean().low > 0


def _describe(difference: Estimate) -> str:
    if not difference.has_interval:
        return f"{difference.mean:+.5f}  too few clips to tell"
    verdict = "worse" if difference.low > 0 else "better" if difference.high < 0 else "no difference shown"
    return f"{difference.mean:+.5f} ({difference.low:+.5f} to {difference.high:+.5f})  {verdict}"


def _paired(path: Path, losses: ClipLosses, other_path: Path, other: ClipLosses) -> ClipLosses:
    if losses.timesteps != other.timesteps or not losses.clips.keys() & other.clips.keys():
        raise DataError(
            f"{path} and {other_path} were validated on other clips or timesteps",
            expected="runs with some validation clips in common, and one args.eval_timesteps",
            remedy="give both the same args.valid_data and args.eval_timesteps",
        )
    return losses.minus(other)


def _shared_steps(path: Path, run: Validations, other: str, steps: Mapping[int, object]) -> list[int]:
    shared = sorted(run.keys() & steps.keys())
    if not shared:
        raise DataError(
            f"{path} and {other} have no validated step in common",
            expected=f"one of the steps {', '.join(map(str, sorted(steps)[:10]))}",
            remedy="set args.eval_interval so that they meet",
        )
    return shared


def _validations(run_directory: Path) -> Validations:
    found = read_validations(run_directory)
    if not found:
        raise DataError(
            f"{run_directory} holds no {NAME} with a validation in it",
            expected="the directory of a run that has validated (args.eval_interval)",
            remedy="check the path",
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train compare",
        description="Places the validation losses of a run in the band of an expected-curve card "
        "(docs/recipes/*.json), or compares two runs clip by clip.",
        epilog="Exit code: 0 where RUN is as good or better at the last step that both have validated; 1 "
        "where it is worse: above the band, or a paired interval wholly above zero; 2 where they cannot be "
        "compared.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("other", type=Path, metavar="CARD_OR_RUN", help="a card, or another run directory")
    return parser
