"""`args.checkpoint_activations: auto`: as many activations are kept as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from sat_train.config import RunConfig, load_run_config
from sat_train.config.hardware import find_hardware
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.models.recomputation import keeping
from sat_train.planning import activations
from sat_train.planning.activations import (
    FILLED,
    SHARES,
    free_memory,
    largest_share,
    settle,
    settle_for_gpus,
)
from sat_train.planning.planner import Planner

AUTO = "args.checkpoint_activations=auto"
SMALL = ("data.params.max_num_frames=5", "data.params.video_size=[32,32]", "args.compile=off")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    start_single_process()
    yield
    stop_processes()


def _read(*words: str) -> RunConfig:
    return load_run_config(["configs/sft.yaml"], [*SMALL, *words])


@pytest.mark.parametrize(
    "growth",
    [
        lambda share: share,
        lambda share: share**3,
        lambda share: share**0.3,
        lambda share: round(4 * share) / 4,
        lambda share: 0.0,
    ],
    ids=["even", "late", "early", "steps", "none"],
)
def test_what_is_kept_fits_and_everything_is_where_that_fits(growth: Callable[[float], float]) -> None:
    def peak_of(share: float) -> float:
        return 100 + 50 * growth(share)

    for room in range(90, 160):
        share = largest_share(peak_of, room)
        assert (share is None) == (room < 100)
        if share is not None:
            assert peak_of(share) <= room
            assert (share * SHARES).is_integer()
            assert (share == 1) == (peak_of(1) <= room)


def test_more_memory_never_keeps_less() -> None:
    shares = [largest_share(lambda share: 100 + 50 * share, room) or 0 for room in range(90, 160)]
    assert shares == sorted(shares)
    assert len(set(shares)) > SHARES / 2


def test_auto_keeps_what_the_card_has_room_for() -> None:
    config, card = _read(AUTO), find_hardware("h100")
    peaks = [Planner(card, 1).training_peak(keeping(config, share)) for share in (0, 1)]
    assert peaks[0] < peaks[1]
    rooms = {"less than full": 0.5 * peaks[0], "half": sum(peaks) / 2, "more than off": 2 * peaks[1]}
    settled = {}
    for name, room in rooms.items():
        planner = Planner(replace(card, memory_gib=room / FILLED / 2**30), 1)
        settled[name] = settle(planner, config)
        if name != "less than full":
            assert planner.training_peak(settled[name]) <= room
    assert settled["less than full"] == keeping(config, 0)
    assert settled["more than off"] == keeping(config, 1)
    budget = settled["half"].args.checkpoint_budget
    assert budget is not None
    assert 0 < budget < 1


@pytest.mark.parametrize(
    "words",
    [
        ("args.checkpoint_activations=off",),
        ("args.checkpoint_activations=attention",),
        (AUTO, "args.checkpoint_budget=0.5"),
        (AUTO, "args.checkpoint_every=2"),
        (AUTO, "args.checkpoint_offload=true"),
    ],
)
def test_what_is_said_otherwise_stays(words: tuple[str, ...]) -> None:
    config = _read(*words)
    assert settle(Planner(find_hardware("h100"), 1), config) is config
    assert settle_for_gpus(config, start_single_process()) is config
    assert config.args.recomputes == (words[0] != "args.checkpoint_activations=off")


def test_a_cpu_keeps_everything() -> None:
    config = _read(AUTO)
    assert settle_for_gpus(config, start_single_process()) == keeping(config, 1)


def test_memory_that_pytorch_holds_is_free_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6e9, 8e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(1e9))
    assert free_memory(torch.device("cuda", 0)) == 7e9


@pytest.mark.parametrize("kind", [NotImplementedError, AssertionError, AttributeError])
def test_a_model_that_cannot_be_counted_recomputes_everything(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(planner: Planner, config: RunConfig) -> float:
        raise kind("no meta kernel\nfor this")

    monkeypatch.setattr(Planner, "training_peak", fail)
    monkeypatch.setattr(activations, "free_memory", lambda device: 1e12)
    config = _read(AUTO)
    assert settle_for_gpus(config, start_single_process()) == keeping(config, 0)


@pytest.mark.parametrize(
    ("file", "counted"),
    [
        ("condition/control_channels", True),
        ("condition/control_branch", True),
        ("condition/preference", False),
        ("condition/inpainting", False),
    ],
)
def test_a_run_with_more_than_is_counted_recomputes_everything(file: str, counted: bool) -> None:
    paths = ["configs/sft.yaml", f"configs/{file}.yaml"]
    config = load_run_config(paths, [*SMALL, AUTO], purpose="check", check_paths=False)
    planner = Planner(replace(find_hardware("h100"), memory_gib=1e6), 1)
    assert settle(planner, config) == keeping(config, 1 if counted else 0)
