from __future__ import annotations

import pytest

from sat_train.distributed.processes import ProcessGrid, start_single_process


@pytest.fixture(scope="session")
def grid() -> ProcessGrid:
    return start_single_process()
