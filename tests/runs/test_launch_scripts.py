"""`launch/torchrun.sh` starts what its caller means, and ends with what the ranks have said."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.runs.launching import ROOT, environment, run_words

SCRIPT = ROOT / "launch" / "torchrun.sh"


@pytest.mark.parametrize(
    ("devices", "processes"),
    [
        (None, "3"),
        ("", "1"),
        ("2", "1"),
        ("0,1", "2"),
        (" 4, 5 ,6", "3"),
        ("GPU-8f3c2b1a-1f,MIG-c7384736-a7", "2"),
        ("0,-1,2", "1"),
        ("-1", "1"),
    ],
)
def test_one_process_for_each_gpu_that_the_caller_may_use(tmp_path: Path, devices, processes) -> None:
    # programs that the script calls: what they are given is what is looked at
    for name, body in {"python": 'printf "%s\\n" "$@"', "nvidia-smi": 'printf "GPU %s: x\\n" 0 1 2'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {**environment(), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    del variables["CUDA_VISIBLE_DEVICES"]
    if devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = devices
    words = ["--base", "my file.yaml", "args.experiment_name=$(touch x)"]
    done = subprocess.run([SCRIPT, *words], cwd=tmp_path, env=variables, text=True, stdout=-1, check=True)
    given = done.stdout.splitlines()
    assert given[given.index("--nproc-per-node") + 1] == processes
    assert given[-4:] == [str(ROOT / "launch" / "train_video.py"), *words]
    assert {path.name for path in tmp_path.iterdir()} == {"python", "nvidia-smi"}


def test_paths_are_the_caller_s_and_the_last_words_are_the_run_s(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {ROOT}/configs/sft.yaml\nargs: {{train_data: [my_clips]}}\n")
    link = tmp_path / "start"
    link.symlink_to(SCRIPT)
    done = run_words(["env", "NPROC_PER_NODE=2", str(link), "--base", "mine.yaml"], cwd=tmp_path)
    assert done.returncode == 2, done.output
    fault = "args.train_data.0 = my_clips: expected a file or folder that exists [mine.yaml]"
    assert done.output.endswith(f"1 fault in the configuration:\n  - {fault}\n"), done.output
    assert "Traceback" not in done.output
