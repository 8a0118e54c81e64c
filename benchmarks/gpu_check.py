"""The first hour on a GPU: measures what could only be computed, and says where the two disagree.

    python benchmarks/gpu_check.py                                  # one GPU, all checks, about 25 minutes
    python benchmarks/gpu_check.py --list
    python benchmarks/gpu_check.py --only env attention step_5b_lora --out findings.jsonl
    python benchmarks/gpu_check.py --minutes 15                     # those that fit, in this order
    torchrun --nproc_per_node 8 benchmarks/gpu_check.py --out findings.jsonl          # several GPUs
    torchrun --nproc_per_node 4 benchmarks/gpu_check.py --only resume_here            # resumes what 8 trained
    python benchmarks/gpu_check.py --tiny                           # the embedded model, also on a CPU

It needs neither released weights nor a network: what a step costs does not depend on the numbers in it. Each
line shows the measured value, the prediction and whether they agree; `--out` collects them as JSON lines.

On one GPU each check is a process of its own: one that fails, hangs or runs out of memory does not end the
others. The exit code is 1 where a check failed, and 2 where none could run. Send the file with a report of
a bug.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sat_train.cli.main import run_cli
from sat_train.cli.options import positive
from sat_train.errors import LaunchError

if TYPE_CHECKING:
    from benchmarks.gpu_parts.check import Check, Setting

_PATIENCE = 4  # times its minutes until a check is ended


def one_gpu() -> tuple[Check, ...]:
    """Returns the checks of one GPU, the most important first."""
    from benchmarks.gpu_parts import blocks, frozen, ladder, machine, runs, steps

    heavy = (*steps.CHECKS, *ladder.CHECKS, *frozen.CHECKS)
    return (*machine.CHECKS, *blocks.CHECKS, *heavy, *runs.CHECKS)


def several_gpus() -> tuple[Check, ...]:
    """Returns the checks of several GPUs."""
    from benchmarks.gpu_parts import machine, several

    return (*machine.CHECKS[:2], *several.CHECKS)


def chosen(checks: Sequence[Check], options: argparse.Namespace) -> list[Check]:
    """Returns the checks that are asked for; prints which do not fit into the minutes.

    Raises:
        LaunchError: There is none.
    """
    unknown = set(options.only or ()) - {check.name for check in checks}
    if unknown:
        raise LaunchError(
            f"--only: no check {', '.join(sorted(unknown))}", expected="checks that --list names"
        )
    wanted = [check for check in checks if not options.only or check.name in options.only]
    taken, minutes = [], 0.0
    for check in wanted:
        if options.minutes is None or minutes + check.minutes <= options.minutes:
            taken.append(check)
            minutes += check.minutes
    left = [check.name for check in wanted if check not in taken]
    if left:
        print(f"no time for: {', '.join(left)}", flush=True)
    if not taken:
        least = min(check.minutes for check in wanted)
        raise LaunchError(
            f"--minutes {options.minutes:g}: no check is so short", expected=f"{least:g} or more"
        )
    return taken


def run_here(checks: Sequence[Check], setting: Setting, out: Path | None) -> list[str]:
    """Runs checks in this process; returns the names of those that failed.

    An error on one of several ranks ends all, after the timeout of collectives: leave the check out then.

    Ranks: all.
    """
    from benchmarks.gpu_parts.check import carry_out

    able = [check for check in checks if setting.on_gpu or check.on_cpu]
    for check in (each for each in checks if each not in able):
        print(f"  LEFT OUT {check.name}: only on a GPU", flush=True)
    return [check.name for check in able if not carry_out(check, setting, out)]


def run_apart(checks: Sequence[Check], options: argparse.Namespace) -> list[str]:
    """Runs each check in a process of its own; returns the names of those that failed."""
    failed = []
    for check in checks:
        command = [sys.executable, __file__, "--here", "--only", check.name, "--folder", str(options.folder)]
        command += ["--out", str(options.out)] if options.out else []
        command += ["--tiny"] if options.tiny else []
        start = time.monotonic()
        try:
            code = subprocess.run(
                command, check=False, timeout=check.minutes * 60 * _PATIENCE + 120
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            failed.append(check.name)
        if code not in (0, 1):
            print(f"  FAIL {check.name} ended with {code} after {time.monotonic() - start:.0f} s", flush=True)
    return failed


def make_setting(*, tiny: bool, folder: Path) -> Setting:
    """Joins the ranks and recognizes the card.

    Ranks: all.
    """
    import torch

    from benchmarks.gpu_parts.check import Setting, recognized
    from sat_train.config.hardware import find_hardware
    from sat_train.distributed.environment import RankEnv
    from sat_train.distributed.processes import start_processes

    mesh = start_processes(RankEnv.read(), timeout_minutes=10)
    card = None
    if mesh.device.type == "cuda":
        memory = torch.cuda.get_device_properties(mesh.device).total_memory / 2**30
        card = recognized(torch.cuda.get_device_name(mesh.device), memory)
    return Setting(mesh, card or find_hardware("h100"), tiny, folder)


def check_card() -> None:
    """Checks that there is a GPU, without which checks of released sizes take hours.

    Raises:
        LaunchError: There is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise LaunchError(
            "no GPU that torch can use", expected="a CUDA device", remedy="--tiny runs on a CPU, too"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks")
    parser.add_argument("--list", action="store_true", help="print the checks and end")
    minutes = positive(float, 10_000)
    parser.add_argument("--minutes", type=minutes, help="leave out what does not fit into so many minutes")
    parser.add_argument("--tiny", action="store_true", help="the embedded model in place of released sizes")
    parser.add_argument("--out", type=Path, help="append findings as JSON lines")
    parser.add_argument("--folder", type=Path, help="for what checks write; 30 GB for the checkpoint of 2B")
    parser.add_argument("--here", action="store_true", help="in this process, not each in one of its own")
    return parser.parse_args()


def main() -> int:
    options = parse()
    is_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    checks = several_gpus() if is_several else one_gpu()
    if options.list:
        from benchmarks.gpu_parts.check import listed

        print(f"one GPU:\n{listed(one_gpu())}\nseveral GPUs, with torchrun:\n{listed(several_gpus())}")
        return 0
    if options.out and not options.out.absolute().parent.is_dir():
        raise LaunchError(f"--out {options.out}: its folder does not exist", expected="a file in a folder")
    options.folder = options.folder or Path(tempfile.gettempdir()) / "gpu_check"
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = chosen(checks, options)
    if not options.tiny and not options.here:
        check_card()
    if is_several or options.here:
        failed = run_here(wanted, make_setting(tiny=options.tiny, folder=options.folder), options.out)
    else:
        failed = run_apart(wanted, options)
    if int(os.environ.get("RANK", "0")) == 0 and not options.here:
        print(f"FAIL: {', '.join(failed)}" if failed else "PASS", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
