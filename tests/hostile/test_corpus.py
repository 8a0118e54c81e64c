"""A slice of the corpus, of every family: what a stranger's files do is refused, quickly and in one message.

`python -m tests.hostile` runs all of it.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from tests.hostile.case import Case, Field
from tests.hostile.corpus import corpus
from tests.hostile.generated import set_traps
from tests.hostile.guard import Guard

_SLICE = 48
_REFUSED = ["check", "--base", "nothing.yaml"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::UserWarning")]


def _family(case: Case) -> str:
    return case.name.partition(":")[0]


def _slice() -> list[Case]:
    """Returns each n-th case of each family, and at least two of it."""
    cases = sorted(corpus(), key=_family)
    chosen: list[Case] = []
    for _, group in groupby(cases, _family):
        family = list(group)
        chosen += family[:: min(len(cases) // _SLICE, len(family) // 2)]
    return chosen


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(tmp_path, seconds=90)  # CI machines are busy


def test_a_slice_of_the_corpus_breaks_no_law(guard: Guard) -> None:
    chosen = _slice()
    assert len(chosen) >= _SLICE
    broken = {}
    for case in chosen:
        outcome = guard.run(case)
        if outcome.problems:
            broken[case.name] = (outcome.problems, outcome.output[-2000:])
    assert not broken


def test_the_guard_sees_what_is_wrong(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that sees nothing finds nothing: each of these cases breaks the law that it is named after."""

    def shows_the_secret(field: Field) -> list[str]:
        (field.inside / "x.txt").write_text(field.secret.read_text())
        return _REFUSED

    def writes_outside(field: Field) -> list[str]:
        (field.outside / "new").write_text("x")
        return _REFUSED

    def changes_the_victim(field: Field) -> list[str]:
        field.victim.write_text("yours")
        return _REFUSED

    def runs_a_payload(field: Field) -> list[str]:
        field.executed.mkdir()
        return _REFUSED

    def holds_live_html(field: Field) -> list[str]:
        (field.inside / "data_report").mkdir()
        (field.inside / "data_report" / "index.html").write_text("<p onclick='x'><script>x</script>")
        return _REFUSED

    def ends_with_another_code(field: Field) -> list[str]:
        return ["--help"]

    expected = {
        shows_the_secret: "a secret was taken along",
        writes_outside: "a file was made outside",
        changes_the_victim: "a file outside was changed",
        runs_a_payload: "a payload was executed",
        holds_live_html: "live HTML: p onclick, script",
        ends_with_another_code: "exit code 0",
    }
    for make, problem in expected.items():
        assert guard.run(Case(make.__name__, make)).problems == (problem,)


def test_the_guard_sees_what_an_extension_and_a_configuration_open(guard: Guard) -> None:
    """The files that would do damage are imported if somebody asks for them, and opening one is seen."""

    def imports_the_trap(field: Field) -> list[str]:
        set_traps(field)
        return ["check", "--extension", "evil.py", "--base", "nothing.yaml"]

    def opens_the_secret(field: Field) -> list[str]:
        return ["check", "--base", str(field.secret)]

    (seen,) = guard.run(Case("trap", imports_the_trap)).problems
    assert seen == "a payload was executed"
    problems = guard.run(Case("open", opens_the_secret, opens_nothing=True)).problems
    assert problems
    assert all(problem.startswith("audit: open ") for problem in problems)
