"""Extensions for tests, in temporary folders outside the package: those that the pages on extending show."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = (DOCS / "extend.md", DOCS / "extend_reference.md")


def write_extensions(folder: Path) -> None:
    """Writes each file that the pages show, under its name."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = re.findall(r"`([\w/]+\.(?:py|yaml))`\n```(?:python|yaml)\n(.*?)```", pages, re.DOTALL)
    for name, code in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
