"""Laws of an extension that runs on two ranks try: they hold for a sound one, and name planted faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sat_train.cli.new_extension import write_skeleton
from sat_train.distributed.processes import stop_processes
from sat_train.testing import BrokenLaws, RankPool, check_extension
from tests.unit.testing.faulty import used, write_faulty

pytestmark = pytest.mark.ranks

ON_RANKS = ("resume", "export", "cache", "zero", "tensor_parallel")


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stop_processes()
    return write_faulty(tmp_path_factory.mktemp("faulty"))


def test_all_laws_hold_for_the_skeleton_of_an_extension(tmp_path: Path, living_ranks: RankPool) -> None:
    """Those that need no ranks are tried on the skeletons in `tests/unit/cli/test_new_extension.py`."""
    folder = write_skeleton(tmp_path, "camera", "condition")
    report = check_extension(folder, folder / "camera.yaml", laws=ON_RANKS, ranks=living_ranks)
    assert {each.law: each.outcome for each in report.results} == dict.fromkeys(ON_RANKS, "holds")


def test_planted_faults_are_named(extension: Path, living_ranks: RankPool) -> None:
    """One run is compared with all others, so that one extension has all faults."""
    words = used(fault="on_ranks", condition_fault="count")
    laws = ["resume", "cache", "tensor_parallel", "zero"]
    with pytest.raises(BrokenLaws) as raised:
        check_extension(extension, *words, laws=laws, ranks=living_ranks)
    details = {each.law: each.detail for each in raised.value.report.broken}
    for law, message in {
        "resume": r"resumed at step 2, the losses are .* kept in Python",
        "cache": r"with data\.cache=(fill|require) the losses are .*earlier samples",
        "tensor_parallel": r"with model_parallel_size 2 .*refused",
        "zero": r"stage3 \(args\.zero_stage=3 .*\) fails: RuntimeError",
    }.items():
        assert re.search(message, details[law]), (law, details[law])
