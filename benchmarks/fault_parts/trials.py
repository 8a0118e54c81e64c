"""One trial: a run in which one thing goes wrong, the run that resumes it, and what both must have kept."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.fault_parts.injection import Injection, RaisingCallback, read_only, unreadable
from benchmarks.fault_parts.ranks import Ended, RunningRanks, WarmRanks
from sat_train.interchange.locate import read_transformer_weights

RANKS = 2
STEPS, SAVE_INTERVAL = 8, 2
_WHOLE = f"step {STEPS}/{STEPS}"  # the run was faster than the fault
ASSETS = Path(__file__).resolve().parents[2] / "sat_train/assets"
DEMO = ASSETS / "demo/train"
LAYERS = 2  # of the tiny model's six: ZeRO-3 takes its time by the module
NUM_CLIPS = 8
_TIMEOUT_S = 240.0
_DISK_MB = 400
_TRACEBACK = "Traceback (most recent call last)"
_REPORTERS = (
    ("metrics_file", "MetricsFile", "reported"),
    ("tensorboard", "TensorBoard", "started"),
    ("tensorboard", "TensorBoard", "reported"),
    ("progress", "PlainProgress", "reported"),
)
_FAILING_FILES = (
    "*_states.pt*",
    "*pieces_rank*",
    "*manifest.json*",
    "*metrics.jsonl*",
    "*.safetensors*",
    "*latest*",
    "*tfevents*",
)


@dataclass(frozen=True)
class Recipe:
    """Settings of the run under test.

    Args:
        method: `sft` or `lora`: the preset.
        stage: ZeRO stage.
        async_save: `on` or `off`.
    """

    method: str
    stage: int
    async_save: str = "on"

    def words(self, trial_folder: TrialFolder) -> list[str]:
        """Returns the command line of `sat-train train`."""
        rank = "model.network_config.params.modules.lora_config.params.r=8"
        return [
            *("--base", f"configs/{self.method}.yaml", *([rank] if self.method == "lora" else [])),
            *(f"args.train_iters={STEPS}", f"args.save_interval={SAVE_INTERVAL}", "args.log_interval=1"),
            *(f"args.zero_stage={self.stage}", "args.batch_size=1", "args.num_workers=0", "args.lr=1e-3"),
            *(f"args.eval_interval={STEPS // 2}", "args.eval_iters=1", "args.valid_video_interval=null"),
            *(f"model.network_config.params.num_layers={LAYERS}", f"args.load={trial_folder.weights_file}"),
            *("data.params.max_num_frames=5", "data.params.video_size=[32,48]", "data.params.views=2"),
            *("data.cache=fill", f"data.cache_dir={trial_folder.cache}", "data.cache_shard_mb=0.02"),
            *(f"args.train_data=[{trial_folder.clips}]", "args.experiment_name=trial", "args.resume=auto"),
            *(f"args.save={trial_folder.runs}", "data.max_bad_fraction=0.5"),
            f"args.async_save={self.async_save}",
        ]


RECIPES = tuple(
    Recipe(method, stage, ("on", "off")[(stage + (method == "lora")) % 2])
    for method in ("sft", "lora")
    for stage in (1, 2, 3)
)


def _layer_of(name: str) -> int:
    """Returns the layer that a weight belongs to; -1 for one outside of the layers."""
    found = re.search(r"(?:layers|adaLN_modulations|layernorm_list)\.(\d+)\.", name)
    return int(found[1]) if found else -1


@dataclass(frozen=True)
class TrialFolder:
    """Folder of a trial: its own clips, cache and run directories."""

    root: Path

    @property
    def clips(self) -> Path:
        return self.root / "clips"

    @property
    def cache(self) -> Path:
        return self.root / "disk" / "cache"

    @property
    def runs(self) -> Path:
        return self.root / "disk" / "runs"

    @property
    def weights_file(self) -> Path:
        return self.root / "dit.safetensors"

    @property
    def trigger(self) -> Path:
        return self.root / "now"

    def prepare(self) -> None:
        """Makes the folders, copies a few demo clips, and cuts the weights to the first layers."""
        for name in ("videos", "labels"):
            (self.clips / name).mkdir(parents=True)
        (self.root / "disk").mkdir(exist_ok=True)
        for video in sorted((DEMO / "videos").iterdir())[:NUM_CLIPS]:
            shutil.copy(video, self.clips / "videos")
            shutil.copy(DEMO / "labels" / f"{video.stem}.txt", self.clips / "labels")
        weights = load_file(ASSETS / "tiny/dit.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if _layer_of(name) < LAYERS}
        save_file(kept, self.weights_file)

    def run_directory(self) -> Path | None:
        """Returns the newest run directory: a run that was stopped before its first save is not resumed."""
        found = sorted(self.runs.glob("trial-*")) if self.runs.exists() else []
        return found[-1] if found else None

    def steps(self) -> list[int]:
        """Returns the steps that have a committed checkpoint."""
        folder = self.run_directory()
        manifests = folder.glob("*/manifest.json") if folder else []
        return sorted(int(path.parent.name) for path in manifests if path.parent.name.isdigit())

    def losses(self) -> dict[int, float]:
        """Returns the training loss of each step; where a step was done twice, the later one."""
        folder = self.run_directory()
        path = folder / "metrics.jsonl" if folder else None
        if path is None or not path.exists():
            return {}
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return {entry["step"]: entry["loss"] for entry in entries if "grad_norm" in entry}

    def weights(self) -> dict[str, Any]:
        """Returns the weights of the last checkpoint."""
        folder = self.run_directory()
        assert folder is not None, "the run has no directory"
        weights = read_transformer_weights(folder / str(STEPS))
        return dict(weights)


@dataclass(frozen=True)
class Reference:
    """Result of an undisturbed run of a recipe."""

    losses: dict[int, float]
    weights: dict[str, Any]
    seconds: float


@dataclass
class Fault:
    """One thing that goes wrong.

    Args:
        kind: Its name in the table.
        says: What the output must hold, as a pattern; the cause in the person's words.
        strike: Makes it happen, at its moment; told the running ranks and the trial_folder.
        injection: What is put into the ranks from the start.
        mend: What happens between the runs, such as room on the disk again; returns what the resumed run must
            say then, as a pattern.
        same_numbers: Losses and weights must be those of the reference.
        intervals: Save intervals that may be lost: the third save in a row that fails ends the run.
    """

    kind: str
    says: str
    strike: Callable[[RunningRanks, TrialFolder], None] = lambda ranks, trial_folder: None
    injection: Callable[[TrialFolder], Injection] | None = None
    mend: Callable[[TrialFolder], str] = lambda trial_folder: ""
    same_numbers: bool = True
    intervals: int = 1


def _signals(kind: str, number: signal.Signals, ranks: list[int], says: str) -> Fault:
    return Fault(kind, says, strike=lambda running, trial_folder: running.signal(number, ranks=ranks))


def _fill(running: RunningRanks, trial_folder: TrialFolder) -> None:
    with open(trial_folder.root / "disk" / "filler", "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


def _free(trial_folder: TrialFolder) -> str:
    (trial_folder.root / "disk" / "filler").unlink(missing_ok=True)
    return ""


def _touch(running: RunningRanks, trial_folder: TrialFolder) -> None:
    trial_folder.trigger.touch()


def _untouch(trial_folder: TrialFolder) -> str:
    trial_folder.trigger.unlink(missing_ok=True)
    return ""


def _end_all(running: RunningRanks, trial_folder: TrialFolder) -> None:
    running.signal(signal.SIGKILL, ranks=range(RANKS))


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def draw_fault(chance: random.Random) -> Fault:
    """Draws one thing that goes wrong, each kind as often."""

    def flip_in_checkpoint(trial_folder: TrialFolder) -> str:
        steps, folder = trial_folder.steps(), trial_folder.run_directory()
        if not steps or folder is None:
            return ""
        _flip(chance.choice(sorted((folder / str(steps[-1])).iterdir())), chance)
        return r"corrupt|damaged|does not match"

    def flip_in_cache(trial_folder: TrialFolder) -> str:
        shards = sorted(trial_folder.cache.rglob("*.safetensors")) if trial_folder.cache.exists() else []
        if shards:
            _flip(chance.choice(shards), chance)
        return ""  # the entry may not be read again

    def lose_a_clip(running: RunningRanks, trial_folder: TrialFolder) -> None:
        chance.choice(sorted((trial_folder.clips / "videos").iterdir())).unlink(missing_ok=True)

    one, number = [chance.randrange(RANKS)], chance.randrange(STEPS)
    pattern = chance.choice(_FAILING_FILES)
    reporter = chance.choice(_REPORTERS)
    ended = rf"saved step|saved .*/\d+|nothing was trained|before the start|stopped before|{_WHOLE}"
    kinds = [
        _signals("SIGTERM, one rank", signal.SIGTERM, one, ended),
        _signals("SIGTERM, all ranks", signal.SIGTERM, list(range(RANKS)), ended),
        _signals("SIGINT, one rank", signal.SIGINT, one, ended),
        _signals("SIGINT, all ranks", signal.SIGINT, list(range(RANKS)), ended),
        _signals("SIGKILL, one rank", signal.SIGKILL, one, rf"rank \d|another rank|lost|{_WHOLE}"),
        _signals("SIGKILL, all ranks", signal.SIGKILL, list(range(RANKS)), r""),
        Fault("disk full", rf"No space left|{_WHOLE}", strike=_fill, mend=_free, intervals=3),
        Fault(
            "disk read-only",
            rf"Read-only file system|{_WHOLE}",
            strike=_touch,
            injection=lambda trial_folder: read_only(trial_folder.trigger, trial_folder.root / "disk"),
            mend=_untouch,
            intervals=3,
        ),
        Fault(
            "EIO on one file",
            rf"Input/output error|{_WHOLE}",
            strike=_touch,
            injection=lambda trial_folder: unreadable(
                trial_folder.trigger, f"{trial_folder.root}/disk/{pattern}"
            ),
            mend=_untouch,
            intervals=3,
        ),
        Fault(
            "callback raises",
            rf"{reporter[1]} failed.*injected into|{_WHOLE}",
            injection=lambda trial_folder: RaisingCallback(*reporter, at_call=number),
        ),
        Fault(
            "clip vanishes",
            rf"bad clip|cannot be used|No such file|{_WHOLE}",
            strike=lose_a_clip,
            same_numbers=False,
        ),
        Fault("flipped byte, checkpoint", r"", strike=_end_all, mend=flip_in_checkpoint),
        Fault("flipped byte, cache", r"", strike=_end_all, mend=flip_in_cache),
    ]
    return chance.choice(kinds)


@dataclass
class Verdict:
    """Result of a trial; `problems` is empty if all promises held."""

    kind: str
    recipe: Recipe
    moment_s: float
    steps_lost: int = 0
    problems: list[str] = field(default_factory=list)
    output: str = ""


def make_reference(warm: WarmRanks, recipe: Recipe, root: Path) -> Reference:
    """Trains a recipe without any fault."""
    trial_folder = TrialFolder(root)
    trial_folder.prepare()
    begin = time.monotonic()
    ended = warm.start(recipe.words(trial_folder), ranks=RANKS, log=root / "log").wait(timeout_s=_TIMEOUT_S)
    assert ended.succeeded, ended.output
    return Reference(trial_folder.losses(), trial_folder.weights(), time.monotonic() - begin)


def run_trial(
    warm: WarmRanks, recipe: Recipe, fault: Fault, moment_s: float, root: Path, reference: Reference
) -> Verdict:
    """Runs one trial.

    Args:
        moment_s: Seconds after the start at which the fault strikes.
        root: A new folder for it.
        reference: Of the same recipe.
    """
    trial_folder = TrialFolder(root)
    verdict = Verdict(fault.kind, recipe, moment_s)
    with _small_disk(root / "disk"):
        trial_folder.prepare()
        first = _train_until(warm, recipe, fault, moment_s, trial_folder)
        done = max(trial_folder.losses(), default=0)
        _judge_first(fault, first, verdict)
        must_say = fault.mend(trial_folder)
        log = root / "log.resumed"
        second = warm.start(recipe.words(trial_folder), ranks=RANKS, log=log).wait(timeout_s=_TIMEOUT_S)
        _judge_second(second, must_say, verdict)
        if second.succeeded:
            _judge_result(fault, trial_folder, reference, verdict)
            # a save that is still being written in the background is lost with the process
            intervals = (2 if must_say else fault.intervals) + (recipe.async_save == "on")
            _judge_loss(second, done, intervals=intervals, verdict=verdict)
    return verdict


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Mounts a file system of its own, which can be filled up, where this user may."""
    folder.mkdir(parents=True)
    options = f"size={_DISK_MB}m"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def _train_until(
    warm: WarmRanks, recipe: Recipe, fault: Fault, moment_s: float, trial_folder: TrialFolder
) -> Ended:
    injection = fault.injection(trial_folder) if fault.injection is not None else None
    running = warm.start(
        recipe.words(trial_folder), ranks=RANKS, log=trial_folder.root / "log", injection=injection
    )
    moment = time.monotonic() + moment_s
    while running.is_running() and time.monotonic() < moment:
        time.sleep(0.02)
    fault.strike(running, trial_folder)
    return running.wait(timeout_s=_TIMEOUT_S)


def _judge_first(fault: Fault, ended: Ended, verdict: Verdict) -> None:
    verdict.output = ended.output
    if ended.hung:
        verdict.problems.append("hung")
    if _TRACEBACK in ended.output:
        verdict.problems.append("traceback")
    # a process that a signal ends before its first line has said nothing; its parent names the signal
    unheard = not ended.output and all(code is not None and code < 0 for code in ended.codes)
    if not unheard and not re.search(fault.says, ended.output):
        verdict.problems.append("cause not named")


def _judge_second(ended: Ended, must_say: str, verdict: Verdict) -> None:
    verdict.output += f"\n--- resumed ---\n{ended.output}"
    if ended.hung:
        verdict.problems.append("hung when resumed")
    elif not ended.succeeded:
        verdict.problems.append(f"not resumed: exit codes {ended.codes}")
    if _TRACEBACK in ended.output:
        verdict.problems.append("traceback when resumed")
    if not re.search(must_say, ended.output):
        verdict.problems.append("damage not named")


def _judge_result(fault: Fault, trial_folder: TrialFolder, reference: Reference, verdict: Verdict) -> None:
    if STEPS not in trial_folder.steps():
        verdict.problems.append("no last checkpoint")
        return
    if not fault.same_numbers:
        return
    losses = trial_folder.losses()
    if any(reference.losses[step] != loss for step, loss in losses.items()):
        verdict.problems.append("other losses")
    weights = trial_folder.weights()
    same = weights.keys() == reference.weights.keys() and all(
        torch.equal(tensor, reference.weights[name]) for name, tensor in weights.items()
    )
    if not same:
        verdict.problems.append("other weights")


def _judge_loss(second: Ended, done: int, *, intervals: int, verdict: Verdict) -> None:
    """Counts the steps that were done twice; a damaged checkpoint costs one interval more."""
    begun = re.search(r"training steps (\d+) to", second.output)
    verdict.steps_lost = max(0, done - int(begun[1]) + 1) if begun else 0
    if verdict.steps_lost > SAVE_INTERVAL * intervals:
        verdict.problems.append(f"{verdict.steps_lost} steps lost")
