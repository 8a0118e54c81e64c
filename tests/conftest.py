"""CPU tests never see a GPU, so that they are the same tests on every machine."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hides CUDA from this process and all it starts, unless only the GPU tests were asked for."""
    wanted = [str(word).rstrip("/") for word in config.args]
    if config.option.markexpr != "gpu" and not all("tests/gpu" in word for word in wanted):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
