"""Every optimizer is itself under ZeRO, across resume and where a rank owns nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sat_train.checkpoint.fragments import MASTER, Fragment, SavedFragments, Scalar, pack_fragments
from sat_train.config.parts.optimizer_parts import OptimizerConfig
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.models.trainable import TrainRule, group_parameters

if TYPE_CHECKING:
    from sat_train.engine.engine import TrainEngine

pytestmark = pytest.mark.ranks

STEPS, HALF, CLIP, BATCH = 6, 3, 0.05, 4
PARAMS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW8bit": {"min_8bit_size": 300},
    "CAME": {},
    "Prodigy": {"lr": 1.0, "d0": 1e-3, "d_coef": 10.0},
    "Adafactor": {"lr": 1e-1},
    "Muon": {"adamw": ["last"]},
}
# Shares of the distance moved. Newton-Schulz in bf16 makes much of rounding, and so do 8 bits at their steps.
ROUNDING = dict.fromkeys(PARAMS, 1e-4) | {"Muon": 2e-2, "AdamW8bit": 1e-2}


class Layout(NamedTuple):
    """How a run is laid out."""

    ranks: int
    stage: int
    offload: str = "none"


WRITING = [Layout(2, 1), Layout(2, 2)]
READING = [Layout(2, 1), Layout(1, 0), Layout(2, 2, "cpu")]


class Net(nn.Module):
    """Matrices and vectors of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(7, 43)
        self.norm = nn.LayerNorm(43)
        self.middle = nn.Linear(43, 29)
        self.last = nn.Linear(29, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.norm(self.first(x)))))


def _loss(network: Any, step: int, rows: slice) -> Tensor:
    inputs = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))[rows]
    return (network(inputs) - inputs.flip(1)).square().mean()


def _choice(name: str) -> Any:
    return OptimizerConfig.of(name, {"lr": 1e-2, "weight_decay": 0.1, **PARAMS[name]})


def _lr(name: str, step: int) -> float:
    return float(_choice(name).params.lr * min(1.0, step / 2))  # a warm-up from zero


def _optimizer_over(choice: Any, module: nn.Module, rules: tuple[TrainRule, ...] = ()) -> Callable[..., Any]:
    from sat_train.engine.optim.build import build_optimizer

    return partial(build_optimizer, choice, group_parameters(module, weight_decay=0.1, rules=rules))


def _plain(name: str) -> dict[str, Tensor]:
    """Trains in one process, without an engine."""
    module = Net()
    optimizer = _optimizer_over(_choice(name), module)(dict(module.named_parameters()))
    for step in range(STEPS):
        optimizer.zero_grad()
        _loss(module, step, slice(None)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = _lr(name, step)
        optimizer.step()
    return {key: parameter.detach() for key, parameter in module.named_parameters()}


def _engine(
    mesh: ProcessMesh, name: str, layout: Layout, only: str = "", rules: tuple[TrainRule, ...] = ()
) -> TrainEngine:
    from sat_train.engine.build import start_engine

    module = Net()
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key.startswith(only))
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // layout.ranks,
        "zero_optimization": {"stage": layout.stage, "offload_optimizer": {"device": layout.offload}},
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return start_engine(module, _optimizer_over(_choice(name), module, rules), settings, mesh)


def _train(mesh: ProcessMesh, engine: TrainEngine, name: str, steps: range) -> None:
    share = BATCH // mesh.data_size
    rows = slice(share * mesh.data_rank, share * (mesh.data_rank + 1))
    for step in steps:
        engine.backward(_loss(engine, step, rows))
        assert engine.step(_lr(name, step)).applied


def _copies(engine: TrainEngine) -> list[Fragment]:
    return [
        Fragment(
            fragment.name,
            fragment.shape,
            fragment.offset,
            {kind: tensor.clone() for kind, tensor in fragment.tensors.items()},
            fragment.scalars,
            {kind: tensor.clone() for kind, tensor in fragment.indivisible.items()},
        )
        for fragment in engine.fragments()
    ]


State = tuple[list[Fragment], dict[str, Scalar]]


def _state(engine: TrainEngine) -> State:
    counters = {name: value for name, value in engine.counters().items() if name != "cur_scale"}
    return _copies(engine), counters  # stage 0 in fp32 has no loss scale


def _write(mesh: ProcessMesh, layout: Layout) -> dict[str, tuple[State, State]]:
    """Trains with every optimizer: the states half-way and at the end."""
    states = {}
    for name in PARAMS:
        engine = _engine(mesh, name, layout)
        _train(mesh, engine, name, range(HALF))
        half = _state(engine)
        _train(mesh, engine, name, range(HALF, STEPS))
        states[name] = half, _state(engine)
    return states


def _resume(mesh: ProcessMesh, layout: Layout, path: Path) -> dict[str, tuple[State, State]]:
    """Loads the states half-way: what was loaded, and the state at the end."""
    states = {}
    for name, (entries, counters) in torch.load(path, weights_only=True).items():
        engine = _engine(mesh, name, layout)
        _train(mesh, engine, name, range(1, 2))  # all that it knows is replaced
        saved = SavedFragments([[Fragment(**entry) for entry in entries["fragments"]]], where="memory")
        engine.load(saved, step=HALF, counters=counters)
        loaded = _state(engine)
        _train(mesh, engine, name, range(HALF, STEPS))
        states[name] = loaded, _state(engine)
    return states


def _gathered(results: list[dict[str, tuple[State, State]]], name: str, part: int) -> State:
    counters = [result[name][part][1] for result in results]
    assert all(each == counters[0] for each in counters), "all ranks count the same"
    return [fragment for result in results for fragment in result[name][part][0]], counters[0]


def _masters(state: State) -> dict[str, Tensor]:
    whole = SavedFragments([state[0]], where="memory").whole(MASTER)
    return {name: whole[name][:] for name in whole}


def _check_close(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    starts = {key: parameter.detach() for key, parameter in Net().named_parameters()}
    assert ours.keys() == theirs.keys() == starts.keys()
    for key, start in starts.items():
        moved = (theirs[key] - start).norm()
        assert moved > 0
        assert (ours[key] - theirs[key]).norm() <= ROUNDING[name] * moved, (name, key)


def _check_same(ours: State, theirs: State) -> None:
    """Compares whole states bit for bit, wherever their fragments begin."""
    first, second = (SavedFragments([state[0]], where="memory") for state in (ours, theirs))
    assert ours[1] == theirs[1]
    assert first.shapes == second.shapes
    for name in first.shapes:
        assert first.scalars(name) == second.scalars(name)
        assert set(first.kinds(name)) == set(second.kinds(name))
        for kind in first.kinds(name):
            assert torch.equal(first.whole(kind)[name][:], second.whole(kind)[name][:]), (name, kind)
        mine, other = first.indivisible(name), second.indivisible(name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[kind], other[kind]) for kind in mine)


@pytest.fixture(scope="module")
def written(rank_pool: Callable[..., Any]) -> dict[Layout, list[dict[str, tuple[State, State]]]]:
    return {layout: rank_pool(layout.ranks)(_write, layout) for layout in WRITING}


@pytest.mark.parametrize("name", PARAMS)
def test_it_equals_a_run_without_an_engine(written: dict[Layout, Any], name: str) -> None:
    expected = _plain(name)
    for results in written.values():
        fragments, counters = _gathered(results, name, 1)
        _check_close(name, _masters((fragments, counters)), expected)
        assert name != "Prodigy" or counters["d"] > PARAMS[name]["d0"]


@pytest.mark.parametrize("layout", READING)
def test_its_state_resumes_on_other_layouts(
    rank_pool: Callable[..., Any], written: dict[Layout, Any], layout: Layout, tmp_path: Path
) -> None:
    source = written[WRITING[0]]
    half = {name: _gathered(source, name, 0) for name in PARAMS}
    states = {name: (pack_fragments(state[0]), state[1]) for name, state in half.items()}
    torch.save(states, tmp_path / "half.pt")
    results = rank_pool(layout.ranks)(_resume, layout, tmp_path / "half.pt")
    for name in PARAMS:
        _check_same(_gathered(results, name, 0), half[name])
        if layout == WRITING[0]:
            _check_same(_gathered(results, name, 1), _gathered(source, name, 1))
        ends = (_masters(_gathered(each, name, 1)) for each in (results, source))
        _check_close(name, *ends)


def _one_owner(mesh: ProcessMesh) -> dict[str, tuple[int, dict[str, float], list[Tensor]]]:
    """Trains one vector, which one rank owns: number of slots, metrics and weights of each rank."""
    results = {}
    for name in PARAMS:
        engine = _engine(mesh, name, Layout(2, 1), only="last.bias")
        _train(mesh, engine, name, range(STEPS))
        weights = [p.detach().clone() for p in engine.module.parameters()]
        results[name] = len(engine.slots), engine.metrics(), weights
    return results


def test_a_rank_that_owns_nothing_takes_part(rank_pool: Callable[..., Any]) -> None:
    first, second = rank_pool(2)(_one_owner)
    starts = [parameter.detach() for parameter in Net().parameters()]
    for name in PARAMS:
        assert sorted((first[name][0], second[name][0])) == [0, 1]
        assert first[name][1] == second[name][1]
        assert all(map(torch.equal, first[name][2], second[name][2]))
        assert sum(not torch.equal(*pair) for pair in zip(first[name][2], starts, strict=True)) == 1
    metrics = first["Prodigy"][1]
    assert metrics["prodigy_d"] == metrics["effective_lr"] > PARAMS["Prodigy"]["d0"]  # at lr 1


def _first_steps(mesh: ProcessMesh, stage: int) -> dict[str, tuple[float, float]]:
    """Two steps with a rule, the second after a resume: how far each weight has moved at most in each."""
    rules = (TrainRule("model.train.last", ("last",), 0.1),)
    before: Any = None
    saved: Any = None
    moved = []
    for _ in range(2):
        engine = _engine(mesh, "AdamW", Layout(mesh.data_size, stage), rules=rules)
        if saved is not None:
            engine.load(saved, step=1, counters=engine.counters())
        before = [master.clone() for master in engine.masters()]
        engine.backward(_loss(engine, 0, slice(0, BATCH // mesh.data_size)))
        engine.step(1e-2)
        names = [slot.name for slot in engine.slots]
        distances = [(now - old).abs().max() for now, old in zip(engine.masters(), before, strict=True)]
        moved.append(dict(zip(names, map(float, distances), strict=True)))
        whole = gather_objects(mesh, pack_fragments(_copies(engine)))
        saved = SavedFragments([[Fragment(**f) for each in whole for f in each["fragments"]]], where="memory")
    return {name: (moved[0][name], moved[1][name]) for name in moved[0]}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_factor_on_the_learning_rate_holds_at_every_stage_and_across_resume(
    rank_pool: Callable[..., Any], stage: int
) -> None:
    for moved in rank_pool(2)(_first_steps, stage):
        for name, distances in moved.items():
            # Adam's steps on one gradient are as long as its learning rate, and decay is a thousandth of it
            expected = 1e-3 if name.startswith("last") else 1e-2
            assert distances == pytest.approx((expected, expected), rel=0.05), name


def _load_at_stage_3(mesh: ProcessMesh) -> str:
    engine = _engine(mesh, "CAME", Layout(1, 1))
    _train(mesh, engine, "CAME", range(1, 2))
    saved = SavedFragments([_copies(engine)], where="step 1")
    with pytest.raises(CheckpointError) as caught:
        _engine(mesh, "AdamW", Layout(1, 3)).load(saved, step=1, counters={})
    with pytest.raises(CheckpointError, match=r"first\.weight, which cannot be sharded"):
        SavedFragments([_copies(engine)], where="step 1", model_size=2).indivisible("first.weight")
    return str(caught.value)


def test_state_of_whole_weights_is_not_divided(rank_pool: Callable[..., Any]) -> None:
    (message,) = rank_pool(1)(_load_at_stage_3)
    assert "step 1 holds exp_avg_sq_row, exp_avg_sq_col, exp_avg_res_row, exp_avg_res_col of first" in message


def _threads(mesh: ProcessMesh, layout: Layout) -> tuple[int, int, int]:
    """Returns the threads before an update, in it and after it."""
    from sat_train.distributed import processors

    engine, before, seen = _engine(mesh, "AdamW", layout), torch.get_num_threads(), []
    update = engine._optimizer.step

    def counted(*options: Any, **more: Any) -> Any:
        seen.append(torch.get_num_threads())
        return update(*options, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "processors_of_a_rank", lambda: before + 2)
        patch.setattr(engine._optimizer, "step", counted)
        _train(mesh, engine, "AdamW", range(1))
    (inside,) = seen
    return before, inside, torch.get_num_threads()


@pytest.mark.parametrize(("offload", "more"), [("cpu", 2), ("none", 0)])
def test_an_update_in_host_memory_takes_the_processors_of_its_rank(
    rank_pool: Callable[..., Any], offload: str, more: int
) -> None:
    ((before, inside, after),) = rank_pool(1)(_threads, Layout(1, 2, offload))
    assert (inside, after) == (before + more, before)
