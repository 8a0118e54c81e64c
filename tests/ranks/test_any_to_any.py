"""A state that any mesh and ZeRO stage saved loads into any other, element for element.

SAT_TRAIN_ALL_LAYOUTS=1 takes every stage at every number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sat_train.checkpoint.fragments import AVERAGE, MASTER, Fragment, SavedFragments, pack_fragments
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.models.dit.sharding import shard_weight

if TYPE_CHECKING:
    from sat_train.engine.engine import TrainEngine
    from sat_train.training.callbacks.ema import ExponentialMovingAverage
from tests.ranks.gathered import gathered_weights
from tests.ranks.toy import frozen_names

pytestmark = pytest.mark.ranks

LR = 1e-2
Kinds = dict[str, dict[str, Tensor]]
KINDS = (MASTER, "exp_avg", "exp_avg_sq", AVERAGE)
LAYER = "transformer.layers.0."
# Odd sizes, so that partitions end inside parameters. Names of SAT's are sharded over two model ranks.
SHAPES = {
    f"{LAYER}attention.query_key_value.weight": (18, 5),
    f"{LAYER}attention.query_key_value.bias": (18,),
    f"{LAYER}attention.dense.weight": (7, 6),
    f"{LAYER}mlp.dense_h_to_4h.weight": (10, 3),
    f"{LAYER}input_layernorm.weight": (13,),
    "time_embed.0.scale": (1,),
}
FROZEN = f"{LAYER}mlp.dense_4h_to_h.weight"


class Layout(NamedTuple):
    """How a run is laid out."""

    ranks: int
    stage: int
    model: int = 1

    def __str__(self) -> str:
        return f"{self.ranks} ranks, ZeRO-{self.stage}, model axis {self.model}"


# Every stage on one rank and two; on three and four, whose partitions end elsewhere, one that cuts each way.
STAGES = {1: (0, 1, 2, 3), 2: (0, 1, 2, 3), 3: (1, 3), 4: (2, 3)}
if os.environ.get("SAT_TRAIN_ALL_LAYOUTS"):
    STAGES = dict.fromkeys((1, 2, 3, 4), (0, 1, 2, 3))
LAYOUTS = [Layout(ranks, stage) for ranks, stages in STAGES.items() for stage in stages]
LAYOUTS += [Layout(2, stage, 2) for stage in (1, 3)] + [Layout(4, stage, 2) for stage in STAGES[4] if stage]
# Half precision adds the rounding of the weights that compute, which is one a stage.
HALF_LAYOUTS = [Layout(1, 1), Layout(2, 2), Layout(2, 3), Layout(2, 1, 2)]


class Pull(nn.Module):
    """Pulls each of its elements to 1 by itself, so that no layout changes what an element becomes."""

    def forward(self, weight: Tensor) -> Tensor:
        trained = [p for p in self.parameters(recurse=False) if p.requires_grad]
        losses = [((p.float() - 1).square() * weight).sum() for p in trained]
        return sum([*losses, *(child(weight) for child in self.children())], torch.zeros(()))


def _module(mesh: ProcessMesh, seed: int) -> Pull:
    root = Pull()
    for number, (name, shape) in enumerate({**SHAPES, FROZEN: (3, 8)}.items()):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + number))
        owner: Any = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, Pull())
            owner = getattr(owner, parent)
        shard = shard_weight(name, whole, rank=mesh.model_rank, size=mesh.model_size)
        owner.register_parameter(last, nn.Parameter(shard.clone(), requires_grad=name != FROZEN))
    return root


def _optimizer_over(tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in tensors.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in tensors.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    live = [group for group in groups if group["params"]]
    return torch.optim.AdamW(live or [nn.Parameter(torch.zeros(1))], lr=LR)


def _build(
    mesh: ProcessMesh, layout: Layout, dtype: str, seed: int
) -> tuple[TrainEngine, ExponentialMovingAverage]:
    from sat_train.engine.build import start_engine
    from sat_train.training.callbacks.ema import ExponentialMovingAverage

    module = _module(mesh, seed)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": layout.stage, "stage3_param_persistence_threshold": 20},
        "bf16": {"enabled": dtype == "bf16"},
        # stage 3 pads uneven gradients with uninitialised memory, which the norm takes in
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    engine = start_engine(module, _optimizer_over, config, mesh)
    return engine, ExponentialMovingAverage(engine, 0.5)


def _train(engine: TrainEngine, average: ExponentialMovingAverage, steps: int) -> None:
    for step in range(steps):
        engine.backward(engine(torch.tensor(1.0 + step)))
        assert engine.step(LR).applied
        average.update()


def _copies(engine: TrainEngine, average: ExponentialMovingAverage) -> list[Fragment]:
    fragments = average.add_tensors(engine.fragments())
    return [
        Fragment(f.name, f.shape, f.offset, {k: t.clone() for k, t in f.tensors.items()}, f.scalars)
        for f in fragments
    ]


def _start(mesh: ProcessMesh, layout: Layout, dtype: str) -> list[Fragment]:
    engine, average = _build(mesh, layout, dtype, seed=layout.ranks)
    _train(engine, average, 2)
    return _copies(engine, average)


def _load_each(
    mesh: ProcessMesh, layout: Layout, dtype: str, path: Path, trained: range
) -> list[tuple[list[Fragment], dict[str, Tensor], list[Fragment]]]:
    """Loads every saved state into one engine: what was loaded, the weights that compute, a step later.

    Args:
        trained: Numbers of the states that are trained on by a step.
    """
    engine, average = _build(mesh, layout, dtype, seed=50)
    results = []
    for number, saved in enumerate(torch.load(path, weights_only=True)):
        shards = [[Fragment(**entry) for entry in shard["fragments"]] for shard in saved]
        state = SavedFragments(shards, where="memory", model_rank=mesh.model_rank, model_size=mesh.model_size)
        engine.load(state, step=2, counters=engine.counters())
        average.load_tensors(state)
        loaded = _copies(engine, average)
        kept = gathered_weights(engine, frozen_names(engine.module))
        _train(engine, average, int(number in trained))
        results.append((loaded, kept, _copies(engine, average) if number in trained else []))
    return results


def _by_model_rank(layout: Layout, results: list[Any]) -> list[list[Fragment]]:
    return [
        [fragment for rank in range(model_rank, layout.ranks, layout.model) for fragment in results[rank]]
        for model_rank in range(layout.model)
    ]


def _whole(layout: Layout, results: list[Any]) -> Kinds:
    saved = SavedFragments(_by_model_rank(layout, results), where=str(layout))
    return {kind: dict(saved.whole(kind)) for kind in KINDS}


def _check_equal(ours: Kinds, theirs: Kinds, where: str, **tolerance: float) -> None:
    for kind in KINDS:
        assert ours[kind].keys() == theirs[kind].keys() == SHAPES.keys()
        for name, tensor in ours[kind].items():
            assert tensor.shape == SHAPES[name]
            torch.testing.assert_close(tensor, theirs[kind][name], msg=f"{where}, {kind} {name}", **tolerance)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def states(
    rank_pool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path, dict[Layout, Any]]:
    """Two steps of training in every layout: in memory, and in one file."""
    dtype = request.param
    layouts = LAYOUTS if dtype == "fp32" else HALF_LAYOUTS
    started = {
        layout: rank_pool(layout.ranks)(_start, layout, dtype, model_parallel_size=layout.model)
        for layout in layouts
    }
    path = tmp_path_factory.mktemp("states") / f"{dtype}.pt"
    shards = [
        [pack_fragments(fragments) for fragments in _by_model_rank(layout, results)]
        for layout, results in started.items()
    ]
    torch.save(shards, path)
    return dtype, path, started


def test_every_layout_takes_up_the_state_of_every_other(
    rank_pool: Callable[..., Any], states: tuple[str, Path, dict[Layout, Any]]
) -> None:
    dtype, path, started = states
    # fp32 and one sum of equal gradients; three ranks divide by three. bf16: gradients are rounded again
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == "fp32" else {"rtol": 1e-2, "atol": 1e-3}
    later: dict[Layout, Kinds] = {}
    for index, target in enumerate(started):
        # equal states become equal states: a step from each fourth says that the engine is whole
        trained = range(index % 4, len(started), 4)
        words = (_load_each, target, dtype, path, trained)
        loads = rank_pool(target.ranks)(*words, model_parallel_size=target.model)
        for number, (source, results) in enumerate(started.items()):
            where = f"{source} -> {target}"
            loaded = _whole(target, [load[number][0] for load in loads])
            _check_equal(loaded, _whole(source, results), where, rtol=0, atol=0)
            assert _scalars(load[number][0] for load in loads) == _scalars(results), where
            _check_computing(target, [load[number][1] for load in loads], loaded[MASTER], where)
            if number not in trained:
                continue
            continued = _whole(target, [load[number][2] for load in loads])
            _check_equal(continued, later.setdefault(source, continued), where, **tolerance)


def _scalars(results: Iterable[list[Fragment]]) -> set[frozenset[tuple[str, float]]]:
    return {frozenset(fragment.scalars.items()) for fragments in results for fragment in fragments}


def _check_computing(
    target: Layout, weights: list[dict[str, Tensor]], masters: dict[str, Tensor], where: str
) -> None:
    """The weights that compute are the masters, rounded."""
    for rank, shard in enumerate(weights[: target.model]):
        for name, tensor in shard.items():
            master = shard_weight(name, masters[name], rank=rank, size=target.model)
            assert torch.equal(tensor, master.to(tensor.dtype)), f"{where}: {name}"


def _counters(mesh: ProcessMesh) -> dict[str, Any]:
    engine, average = _build(mesh, Layout(1, 1), "fp32", seed=1)
    _train(engine, average, 3)
    scalars = {fragment.scalars["step"] for fragment in engine.fragments()}
    on_rank_0(mesh, lambda: None)
    return {"step": scalars, "shapes": engine.trained_shapes()}


def test_counters_and_shapes_are_those_of_what_trains(rank_pool: Callable[..., Any]) -> None:
    (facts,) = rank_pool(1)(_counters)
    assert facts == {"step": {3.0}, "shapes": SHAPES}


PRIVATE_NAMES = {
    2: ("single_partition_of_fp32_groups", "update_lp_params", "_hp_optimizer_states_linked", "optimizer"),
    3: (
        *("grad_position", "get_param_id", "fp32_partitioned_groups_flat", "persistent_parameters"),
        *("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "optimizer"),
    ),
}


def _missing_names(mesh: ProcessMesh, stage: int) -> list[str]:
    engine, _ = _build(mesh, Layout(1, stage), "bf16", seed=1)
    optimizer = engine._engine.optimizer
    missing = [name for name in PRIVATE_NAMES[stage] if not hasattr(optimizer, name)]
    parameter = next(p for p in engine.module.parameters() if p.requires_grad)
    own = ("_hp_mapping",) if stage == 2 else ("ds_numel", "ds_shape", "ds_tensor")
    return missing + [name for name in own if not hasattr(parameter, name)]


@pytest.mark.parametrize("stage", PRIVATE_NAMES)
def test_every_private_name_of_deepspeed_that_holds_state_is_there(
    rank_pool: Callable[..., Any], stage: int
) -> None:
    assert rank_pool(1)(_missing_names, stage) == [[]], "DeepSpeed has changed: see engine/slots.py"
