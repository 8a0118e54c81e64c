"""What is written down of a run, for people and for programs."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import termios
import textwrap
from types import SimpleNamespace

import pytest

from sat_train.config.values import show_duration
from sat_train.errors import LaunchError
from sat_train.training.callbacks.metrics_file import MetricsFile, read_metrics
from sat_train.training.callbacks.progress import describe, describe_validation
from sat_train.training.callbacks.wandb import WeightsAndBiases
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.metrics import TrainMetrics, ValidationMetrics, scalars


def _metrics(step: int, **changes) -> TrainMetrics:
    values = {
        "loss": 0.5,
        "loss_smoothed": 0.25,
        "lr": 1e-5,
        "grad_norm": 0.1,
        "step_time_s": 2.0,
        "data_wait_s": 0.0,
        "samples_per_s": 4.0,
        "peak_memory_gib": 1.5,
        "skipped": 0,
    }
    return TrainMetrics(step=step, **{**values, **changes})


LOSSES = ClipLosses((250, 750), {f"clip{n}": (0.5 - n % 2 / 4, 1.5 - 3 * (n % 2) / 4) for n in range(8)})
VALIDATION = ValidationMetrics(step=2, losses=LOSSES)


def _at(step: int) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(step=step))


def test_a_line_names_what_people_look_at_and_the_time_left():
    (line,) = describe(_metrics(10), 40, with_details=False)
    assert line == "step 10/40 loss 0.500 avg 0.250 lr 1e-5 grad 0.1 2 s/step eta 1m"
    assert " 2 s/step mfu 41% eta" in describe(_metrics(10, mfu=0.4123), 40, with_details=False)[0]
    details = describe(
        _metrics(10, skipped=2, measured={"bad_clips": 3}, data_wait_s=1.0), 40, with_details=True
    )[1]
    assert details == "skipped 2 bad clips 3 waiting for data 50% 4 samples/s peak 1.5 GiB"


def test_no_metric_line_is_wider_than_a_terminal_whatever_the_numbers():
    rng = random.Random(0)
    for _ in range(3000):
        wild = {
            name: rng.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 10 ** rng.uniform(-12, 12)])
            for name in (
                "loss",
                "loss_smoothed",
                "lr",
                "grad_norm",
                "step_time_s",
                "data_wait_s",
                "samples_per_s",
            )
        }
        steps = 10 ** rng.randint(0, 9)
        report = _metrics(rng.randint(0, steps), skipped=steps, measured={"bad_clips": steps}, **wild)
        for line in describe(report, steps, with_details=True):
            assert len("10:59:02 I " + line) <= 80, line


def test_real_runs_have_one_line_a_report():
    for steps in (1000, 20_000):
        report = _metrics(
            steps - 1, loss=0.1234, loss_smoothed=0.1357, lr=9.87e-6, grad_norm=0.823, step_time_s=12.3
        )
        assert len(describe(report, steps, with_details=False)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.2, "60s"), (61, "2m"), (3600, "1h00m"), (86_399, "1d00h"), (187_200, "2d04h")],
)
def test_the_time_left_has_two_units(seconds, text):
    assert show_duration(seconds) == text


def test_on_a_terminal_of_80_columns_no_line_is_torn_and_none_is_glued_to_the_bar():
    """A real terminal, read back as a screen: the bar is gone at the end and each line stands alone."""
    lines = _screen_of(
        """
        for step in range(1, 31):
            trainer.state.step = step
            progress.reported(metrics_of(step))
            progress.step_done(trainer)
            log.info("saved /a/folder/of/a/run/%d", step)
        log.warning("one long line " + "x" * 100)
        progress.reported(ValidationMetrics(30, ClipLosses((500,), {"a": (0.5,)})))
        progress.closed()
        log.info("the end")
        """
    )
    clock = re.compile(r"^\d\d:\d\d:\d\d [IW] ")
    continued = [line for line in lines if not clock.match(line)]
    assert continued == ["x" * (100 + len("10:59:02 W one long line ") - 80)], (
        "the terminal wraps, nobody else"
    )
    texts = [clock.sub("", line) for line in lines]
    assert [text for text in texts if text.startswith("saved")] == [
        f"saved /a/folder/of/a/run/{step}" for step in range(1, 31)
    ]
    assert sum(text.startswith("step ") for text in texts) == 31
    assert texts[-1] == "the end"


_ON_A_TERMINAL = """
import sys
from types import SimpleNamespace
from sat_train.log import configure_logging, get_logger
from sat_train.training.callbacks.progress import BarProgress, build_progress
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.metrics import TrainMetrics, ValidationMetrics
from sat_train.config.learning_rate import LearningRate
configure_logging()
log = get_logger("sat_train.test")
rate = LearningRate(peak=1e-3, warmup_steps=3, style="linear", decay_end=100, floor_ratio=0.1)
trainer = SimpleNamespace(state=SimpleNamespace(step=0), train_iters=1000, learning_rate=rate)
def metrics_of(step):
    return TrainMetrics(step, 0.1234, 0.2345, 9.87e-6, 0.823, 0.22, 0.01, 4.2, 12.3, 0)
progress = build_progress()
assert isinstance(progress, BarProgress)
progress.started(trainer)
"""


def _screen_of(body: str) -> list[str]:
    """Runs Python on a terminal of 80 columns; returns the lines that stand there in the end."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_A_TERMINAL + textwrap.dedent(body)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm"},
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            written += part
    assert process.wait() == 0, written.decode()
    assert b"[bold]" not in written, "the bar's own markup is never shown"
    return [line for line in map("".join, _rows(written.decode())) if line.strip()]


def _rows(written: str) -> list[list[str]]:
    """Does what a terminal does with text, line ends, and the few codes a bar uses."""
    rows, row, column = [[" "] * 80], 0, 0
    for match in re.finditer(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])|(.)", written, re.DOTALL):
        number, code, character = match.groups()
        if code == "A":
            row -= int(number or 1)
        elif code == "K":
            rows[row] = [" "] * 80
        elif code is not None:
            assert code in "mhl", f"unknown code {match.group()!r}"
        elif character == "\r":
            column = 0
        elif character == "\n" or column == 80:
            row, column = row + 1, 0 if character != "\n" else column
            rows += [[" "] * 80] * (row + 1 - len(rows))
            rows[row] = list(rows[row])
        if code is None and character not in "\r\n":
            rows[row][column] = character
            column += 1
    return [[*"".join(cells).rstrip()] for cells in rows]


def test_every_line_of_the_file_is_json_even_when_a_number_is_not_finite(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.started(_at(0))
    metrics.reported(_metrics(1, grad_norm=float("inf")))
    metrics.reported(VALIDATION)
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first["grad_norm"] is None
    assert first["loss"] == 0.5
    low, high = second.pop("valid_loss_interval")
    limits = second.pop("valid_loss_interval_by_timestep")
    assert 0.5 <= low < 0.75 < high <= 1.0
    assert limits.keys() == {"250", "750"}
    assert second == {
        "step": 2,
        "valid_loss": 0.75,
        "valid_loss_by_timestep": {"250": 0.375, "750": 1.125},
        "valid_samples": 8,
    }


def test_a_resumed_run_drops_the_lines_of_steps_it_will_repeat(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.started(_at(0))
    for step in (1, 2, 3):
        metrics.reported(_metrics(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    MetricsFile(tmp_path).started(_at(2))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_trackers_get_numbers_only():
    assert scalars(_metrics(3, measured={"bad_clips": 0})).keys() == {
        f"train/{name}"
        for name in (
            "loss",
            "loss_smoothed",
            "grad_norm",
            "lr",
            "step_time_s",
            "data_wait_s",
            "samples_per_s",
            "peak_memory_gib",
            "skipped",
            "tflops",
            "bad_clips",
        )
    }
    numbers = scalars(VALIDATION)
    names = ("loss", "loss_at_250", "loss_at_750")
    assert [numbers.pop(f"valid/{name}") for name in names] == [0.75, 0.375, 1.125]
    assert numbers.keys() == {f"valid_interval/{name}_{limit}" for name in names for limit in ("low", "high")}
    alone = ValidationMetrics(2, ClipLosses((500,), {"a": (0.5,)}))
    assert scalars(alone).keys() == {"valid/loss", "valid/loss_at_500"}, "one clip has no interval"


def test_a_validation_is_one_line_and_its_change_is_paired():
    clips = [f"clip {number}" for number in range(8)]
    before = ClipLosses((500,), {clip: (0.1 * number,) for number, clip in enumerate(clips)})
    after = ClipLosses((500,), {clip: (0.1 * number - 0.01,) for number, clip in enumerate(clips)})
    first, second = ValidationMetrics(100, before), ValidationMetrics(200, after)
    (line,) = describe_validation(first, None)
    assert re.fullmatch(r"step 100: validation loss 0\.35000 \(0\.\d+ to 0\.\d+\) on 8 clips", line)
    assert describe_validation(second, first)[1] == "  since step 100 -0.01000 (-0.01000 to -0.01000)"


def test_wandb_without_its_package_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"args\.wandb = true, but the package wandb is not installed"):
        WeightsAndBiases(tmp_path, project="p", config={})
