import pytest

from sat_train.distributed.processes import start_single_process


@pytest.fixture(autouse=True)
def _one_process() -> None:
    """SAT's layers ask for the model axis when they are built."""
    start_single_process()
