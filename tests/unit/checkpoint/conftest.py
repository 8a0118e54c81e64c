from __future__ import annotations

import pytest

from sat_train.distributed.processes import ProcessMesh, start_single_process


@pytest.fixture(scope="session")
def mesh() -> ProcessMesh:
    return start_single_process()
