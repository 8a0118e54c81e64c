"""A run that ended well, made once, of which each case changes a copy."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.forks import run_sat_train
from tests.hostile.words import LORA

STEP = "1"
_SMALL = ["model.network_config.params.modules.lora_config.params.r=2", "args.save_interval=1"]
RESUME = [*LORA, *_SMALL, "args.train_iters=2"]


@cache
def _real_run() -> Path:
    root = Path(tempfile.mkdtemp(prefix="hostile-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    done = run_sat_train([*LORA, *_SMALL], cwd=root)
    assert done.returncode == 0, done.output
    (run,) = (root / "runs").iterdir()
    return run


def copy_run(folder: Path) -> Path:
    """Copies the run to `folder/run`."""
    return Path(shutil.copytree(_real_run(), folder / "run"))


def sign(manifest: Path, body: dict[str, Any]) -> None:
    """Writes a manifest that fits its own hash, as anybody can."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    manifest.write_text(json.dumps({**body, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}))


def replace_file(step: Path, name: str, content: bytes) -> None:
    """Puts other contents into a step and signs its manifest again."""
    (step / name).write_bytes(content)
    body = json.loads((step / "manifest.json").read_text())
    entry = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    body["files"] = [entry if file["name"] == name else file for file in body["files"]]
    sign(step / "manifest.json", body)
