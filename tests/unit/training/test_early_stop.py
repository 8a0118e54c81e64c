"""When a run ends whose validation loss does not fall any more."""

import math
import random

import pytest

from sat_train.config import load_run_config
from sat_train.errors import ConfigError
from sat_train.training.callbacks.early_stop import exhausted_patience


def first_stop(losses: list[float], patience: int, min_delta: float) -> int | None:
    """The number of validations after which a run ends, straight from the definition."""
    for end in range(patience, len(losses) + 1):
        bests = [math.inf]
        lower = []
        for loss in losses[:end]:
            lower.append(loss < bests[-1] - min_delta)
            bests.append(loss if lower[-1] else bests[-1])
        if not any(lower[-patience:]):
            return end
    return None


def test_a_run_ends_after_exactly_patience_validations_in_a_row_without_a_lower_loss():
    rng, ends = random.Random(0), set()
    for _ in range(500):
        losses = [rng.choice([0.1, 0.2, 0.3, 0.4, math.nan]) for _ in range(rng.randint(1, 12))]
        patience, min_delta = rng.randint(1, 4), rng.choice([0.0, 0.15])
        end = first_stop(losses, patience, min_delta)
        for count in range(len(losses) + 1):
            by_step = {10 * number: loss for number, loss in enumerate(losses[:count])}
            reason = exhausted_patience(by_step, patience=patience, min_delta=min_delta)
            assert bool(reason) == (end is not None and count >= end)
        ends.add(end)
    assert {None, 1, 2, 3, 4} <= ends


NEVER_VALIDATED = ("args.eval_interval=null", "args.valid_video_interval=null")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["args.early_stop_patience=3", *NEVER_VALIDATED], r"patience = 3: expected null, or an args\."),
        (["args.early_stop_min_delta=0.1"], r"min_delta = 0\.1: expected 0, or an args\.early_stop_patience"),
    ],
)
def test_settings_of_early_stop_without_what_they_need_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(["configs/sft.yaml"], words, check_paths=False)
