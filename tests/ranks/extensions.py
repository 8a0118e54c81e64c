"""Extensions for tests, in temporary folders outside the package: those that `docs/extend.md` shows."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/extend.md"


def write_extensions(folder: Path) -> None:
    """Writes each file that the page shows, under its name."""
    page = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"`([\w/]+\.(?:py|yaml))`\n```(?:python|yaml)\n(.*?)```", page, re.DOTALL)
    for name, code in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
