import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A SLURM cluster on this machine; skipped where its programs are not installed."""
    if problem := missing():
        pytest.skip(f"no SLURM here: {problem}")
    # the path of a socket has 107 bytes at most; those of pytest's folders may be longer
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.close()
