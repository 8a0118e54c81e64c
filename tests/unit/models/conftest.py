import pytest

from sat_train.distributed.processes import ProcessMesh, start_single_process


@pytest.fixture(autouse=True)
def mesh() -> ProcessMesh:
    """A mesh of one process: SAT's layers ask for the model axis when they are built."""
    return start_single_process()
