"""Order in which two workers take the test files: the longest first, so that they end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Seconds of the long files, on a machine that is busy with other things: only their order counts.
# `pytest --durations=1` prints such lines at its end.
SECONDS: dict[str, int] = {
    "runs/test_newcomer.py": 212,
    "ranks/test_whole_runs.py": 170,
    "ranks/test_any_to_any.py": 132,
    "slurm/test_train_sbatch.py": 120,
    "runs/test_lost_ranks.py": 119,
    "runs/test_kill.py": 110,
    "runs/test_faults.py": 100,
    "ranks/test_checkpoint.py": 65,
    "hostile/test_corpus.py": 61,
    "runs/test_footage.py": 57,
    "ranks/test_blocks_in_deepspeed.py": 48,
    "ranks/test_extensions.py": 46,
    "runs/test_data_page.py": 45,
    "runs/test_readme.py": 44,
    "ranks/test_export.py": 40,
    "runs/test_sample.py": 36,
    "ranks/test_consolidate.py": 36,
    "runs/test_train.py": 36,
    "ranks/test_bucket_runs.py": 32,
    "runs/test_cache.py": 28,
    "unit/models/test_tiny_vae.py": 25,
    "unit/models/test_stack.py": 24,
    "ranks/test_training_steps.py": 24,
    "parity/test_sampling_run.py": 23,
    "ranks/test_trainer.py": 22,
    "runs/test_bad_input.py": 22,
    "parity/test_snippet.py": 19,
    "unit/config/test_guard_rails.py": 18,
    "unit/config/test_malformed_corpus.py": 17,
    "unit/models/test_mixins.py": 17,
    "unit/data/test_inspect.py": 17,
    "parity/test_round_trip.py": 17,
    "unit/config/test_every_key.py": 16,
    "ranks/test_work_queue.py": 15,
    "unit/config/test_model_spec.py": 13,
    "ranks/test_groups.py": 11,
    "unit/config/test_check_command.py": 10,
}
# Short files stand before the last of these, and so does a long one that has no number yet.
_UNKNOWN = 30


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def sort_by_file(items: list[pytest.Item], seconds: Mapping[str, int] = SECONDS) -> None:
    """Sorts in place: files by their seconds; the tests of a file stay in order."""
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), _UNKNOWN))


def table_of(reports: Sequence[pytest.TestReport], *, least: int = 8) -> list[str]:
    """Returns the lines of `SECONDS` for what has just run."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[file_of(report.nodeid)] += report.duration
    return [f'    "{name}": {total:.0f},' for name, total in seconds.most_common() if total >= least]
