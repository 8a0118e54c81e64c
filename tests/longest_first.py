"""Order in which two workers take the test files: the longest first, so that they end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Seconds of the long files on one core. A rough order is enough: `--durations=1` prints them.
SECONDS: dict[str, int] = {
    "slurm/test_train_sbatch.py": 120,
    "runs/test_newcomer.py": 120,
    "ranks/test_whole_runs.py": 110,
    "runs/test_train.py": 105,
    "ranks/test_any_to_any.py": 90,
    "ranks/test_trainer.py": 80,
    "runs/test_readme.py": 80,
    "runs/test_kill.py": 75,
    "runs/test_lost_ranks.py": 70,
    "ranks/test_extensions.py": 65,
    "hostile/test_corpus.py": 61,
    "ranks/test_checkpoint.py": 60,
    "runs/test_sample.py": 51,
    "runs/test_data_page.py": 45,
    "runs/test_bad_input.py": 42,
    "ranks/test_lora_runs.py": 40,
    "ranks/test_training_steps.py": 30,
    "runs/test_cache.py": 28,
    "runs/test_footage.py": 25,
    "parity/test_sampling_run.py": 20,
    "parity/test_snippet.py": 19,
    "unit/config/test_every_key.py": 18,
    "unit/config/test_guard_rails.py": 18,
    "parity/test_round_trip.py": 17,
}


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def sort_by_file(items: list[pytest.Item], seconds: Mapping[str, int] = SECONDS) -> None:
    """Sorts in place: files by their seconds, those without a number last; tests of a file stay in order."""
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), 0))


def table_of(reports: Sequence[pytest.TestReport], *, least: int = 8) -> list[str]:
    """Returns the lines of `SECONDS` for what has just run."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[file_of(report.nodeid)] += report.duration
    return [f'    "{name}": {total:.0f},' for name, total in seconds.most_common() if total >= least]
