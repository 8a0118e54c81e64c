from __future__ import annotations

import pytest

from sat_train.distributed.processes import ProcessMesh, start_single_process


@pytest.fixture
def mesh() -> ProcessMesh:
    """A mesh of one process; an earlier test of this process may have ended its own."""
    return start_single_process()
