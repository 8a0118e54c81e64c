"""Order in which two workers take the test files: the longest first, so that they end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Seconds of the long files, on a machine that is busy with other things: only their order counts.
# `pytest --durations=1` prints such lines at its end.
SECONDS: dict[str, int] = {
    "slurm/test_train_sbatch.py": 249,
    "runs/test_newcomer.py": 212,
    "ranks/test_whole_runs.py": 210,
    "runs/test_kill.py": 125,
    "runs/test_lost_ranks.py": 123,
    "runs/test_faults.py": 106,
    "ranks/test_any_to_any.py": 101,
    "runs/test_footage.py": 89,
    "ranks/test_blocks_in_deepspeed.py": 86,
    "runs/test_readme.py": 71,
    "runs/test_extend_page.py": 60,
    "runs/test_data_page.py": 66,
    "ranks/test_checkpoint.py": 65,
    "hostile/test_corpus.py": 63,
    "runs/test_cache.py": 55,
    "ranks/test_extensions.py": 53,
    "ranks/test_extension_laws.py": 40,
    "ranks/test_conditions.py": 40,
    "ranks/test_lora_runs.py": 47,
    "ranks/test_validation.py": 45,
    "ranks/test_loss_term_runs.py": 30,
    "ranks/test_export.py": 45,
    "ranks/test_plan.py": 40,
    "runs/test_train.py": 43,
    "unit/data/test_paces.py": 40,
    "runs/test_sample.py": 35,
    "ranks/test_consolidate.py": 34,
    "ranks/test_training_steps.py": 32,
    "examples/test_examples.py": 32,
    "ranks/test_branch_runs.py": 29,
    "ranks/test_trainer.py": 27,
    "unit/config/test_guard_rails.py": 24,
    "unit/config/test_malformed_corpus.py": 24,
    "unit/models/test_stack.py": 24,
    "unit/planning/test_plan.py": 24,
    "unit/testing/test_network_laws.py": 24,
    "unit/cli/test_convert.py": 23,
    "ranks/test_bucket_runs.py": 22,
    "unit/data/sources/test_remote_archives.py": 22,
    "ranks/test_optimizers.py": 22,
    "ranks/test_diffusers_recipes.py": 21,
    "runs/test_bad_input.py": 21,
    "unit/test_hardware_lines.py": 19,
    "unit/data/test_corpus.py": 19,
    "unit/config/test_every_key.py": 19,
    "unit/data/test_loader.py": 16,
    "unit/checkpoint/test_publish.py": 15,
    "unit/models/test_mixins.py": 15,
    "ranks/test_work_queue.py": 15,
    "ranks/test_groups.py": 12,
    "runs/test_expected_curve.py": 12,
    "parity/test_sampling_run.py": 11,
    "unit/checkpoint/test_lora_files.py": 11,
    "parity/test_snippet.py": 11,
    "unit/cli/test_stopped_early.py": 10,
    "unit/encoding/cache/test_hostile.py": 9,
    "unit/checkpoint/test_hostile_weights.py": 9,
    "unit/data/test_clip_pool.py": 9,
    "unit/data/test_fields.py": 9,
    "unit/encoding/cache/test_cached_fields.py": 9,
    "runs/test_launch_scripts.py": 9,
    "unit/distributed/test_signals.py": 8,
    "ranks/test_ema.py": 8,
    "parity/test_lora_export.py": 8,
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
