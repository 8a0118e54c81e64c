"""Configurations written on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sat_train.config import RunConfig, load_run_config

Load = Callable[..., RunConfig]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a YAML file of this name and gives its path."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def load(write: Callable[[str, str], str]) -> Load:
    """Loads `configs/sft.yaml` with a text behind it and words after that; looks at no paths."""

    def load_text(text: str = "", *words: str, **options: object) -> RunConfig:
        behind = [write("behind.yaml", text)] if text else []
        return load_run_config(["configs/sft.yaml", *behind], words, **{"check_paths": False, **options})

    return load_text
