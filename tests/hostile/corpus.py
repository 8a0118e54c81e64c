"""All hostile inputs."""

from __future__ import annotations

from itertools import chain

from tests.hostile import (
    caches,
    configurations,
    footage,
    generated,
    malformed,
    run_directories,
    tables,
    weights,
)
from tests.hostile.case import Case

FAMILIES = (configurations, generated, malformed, weights, run_directories, footage, tables, caches)


def corpus() -> list[Case]:
    """Returns all cases, family by family; their names are unique."""
    cases = list(chain.from_iterable(family.cases() for family in FAMILIES))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases of one name"
    return cases
