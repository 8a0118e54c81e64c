"""Order in which two workers take the test files: the longest first, so that they end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Seconds of the long files, on a machine that is busy with other things: only their order counts.
# `pytest --durations=1` prints such lines at its end.
SECONDS: dict[str, int] = {
    "slurm/test_train_sbatch.py": 110,
    "ranks/test_whole_runs.py": 85,
    "runs/test_lost_ranks.py": 80,
    "runs/test_faults.py": 75,
    "runs/test_newcomer.py": 65,
    "ranks/test_any_to_any.py": 55,
    "ranks/test_blocks_in_deepspeed.py": 55,
    "hostile/test_corpus.py": 50,
    "ranks/test_checkpoint.py": 50,
    "runs/test_train.py": 42,
    "runs/test_footage.py": 38,
    "ranks/test_extensions.py": 38,
    "ranks/test_extension_laws.py": 38,
    "runs/test_cache.py": 36,
    "runs/test_kill.py": 32,
    "ranks/test_export.py": 32,
    "ranks/test_validation.py": 30,
    "ranks/test_consolidate.py": 30,
    "runs/test_readme.py": 28,
    "unit/testing/test_network_laws.py": 27,
    "unit/config/test_guard_rails.py": 25,
    "ranks/test_gpu_check.py": 25,
    "ranks/test_optimizers.py": 25,
    "ranks/test_lora_runs.py": 24,
    "runs/test_extend_page.py": 24,
    "unit/test_hardware_lines.py": 24,
    "ranks/test_training_steps.py": 24,
    "unit/data/test_paces.py": 22,
    "unit/planning/test_plan.py": 22,
    "unit/data/sources/test_remote_archives.py": 22,
    "runs/test_data_page.py": 20,
    "ranks/test_trainer.py": 20,
    "unit/data/test_loader.py": 20,
    "ranks/test_branch_runs.py": 19,
    "ranks/test_diffusers_recipes.py": 19,
    "ranks/test_plan.py": 19,
    "ranks/test_condition_report.py": 18,
    "ranks/test_bucket_runs.py": 18,
    "ranks/test_conditions.py": 18,
    "ranks/test_loss_term_runs.py": 17,
    "unit/data/test_corpus.py": 17,
    "runs/test_sample.py": 16,
    "unit/config/test_malformed_corpus.py": 16,
    "unit/checkpoint/test_publish.py": 16,
    "runs/test_bad_input.py": 15,
    "examples/test_examples.py": 15,
    "unit/cli/test_convert.py": 14,
    "unit/distributed/test_signals.py": 14,
    "unit/models/test_stack.py": 14,
    "unit/models/test_mixins.py": 14,
    "ranks/test_gradient_check.py": 12,
    "parity/test_sampling_run.py": 11,
    "runs/test_expected_curve.py": 11,
    "ranks/test_work_queue.py": 11,
    "unit/data/test_clip_pool.py": 11,
    "unit/models/test_recompute_budget.py": 11,
    "unit/checkpoint/test_lora_files.py": 9,
    "unit/cli/test_stopped_early.py": 9,
    "parity/test_controlnet.py": 8,
    "unit/cli/test_new_extension.py": 8,
    "runs/test_launch_scripts.py": 8,
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
