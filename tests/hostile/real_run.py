"""A run that ended well, made once, of which each case changes a copy."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.hostile.words import LORA

STEP = "1"
_ROOT = Path(__file__).resolve().parents[2]
_SMALL = ["model.network_config.params.modules.lora_config.params.r=2", "args.save_interval=1"]
RESUME = [*LORA, *_SMALL, "args.train_iters=2"]


@cache
def _real_run() -> Path:
    root = Path(tempfile.mkdtemp(prefix="hostile-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    words = [sys.executable, "-m", "sat_train.cli.main", *LORA, *_SMALL]
    paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        words, cwd=root, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
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
