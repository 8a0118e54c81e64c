"""A run that is saved and resumed continues as if nothing had happened: DeepSpeed engines, gloo ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sat_train.checkpoint.find import ResumePoint, find_resume_point
from sat_train.checkpoint.fragments import SavedFragments
from sat_train.checkpoint.layout import SAT_PREFIX, fragments_file_name, model_file_name
from sat_train.checkpoint.manifest import BaseWeights, Manifest, read_manifest, verify_checkpoint
from sat_train.distributed.collectives import on_rank_0, wait_until
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.files import write_file
from sat_train.testing.pool import FailedOnRank
from sat_train.weights.names import dtype_name

if TYPE_CHECKING:
    from sat_train.checkpoint.background import BackgroundWriter
    from sat_train.engine.engine import TrainEngine
    from sat_train.training.callbacks.ema import ExponentialMovingAverage
from tests.ranks.gathered import gathered_weights
from tests.ranks.toy import CONSTANT, build_toy, frozen_names, toy_run

pytestmark = pytest.mark.ranks

# ZeRO-0 in half precision counts Adam's steps wrongly in DeepSpeed, so there is no such case
CASES = [
    (stage, dtype, lora)
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for lora in (False, True)
    if (stage, dtype) != (0, "bf16")
]
LR = 1e-2
BASE = BaseWeights(source="base.safetensors", sha256="b" * 64)


def _fragment(
    name: str,
    *,
    shape: Any = (16, 8),
    offset: int = 0,
    values: Any = None,
    scalars: Any = None,
) -> dict[str, Any]:
    tensors = {"master": torch.zeros(128) if values is None else values}
    return {"name": name, "shape": shape, "offset": offset, "tensors": tensors, "scalars": scalars or {}}


def build_engine(
    mesh: ProcessMesh, *, zero_stage: int, dtype: str, lora: bool, seed: int = 0, width: int = 16
) -> TrainEngine:
    from sat_train.engine.build import start_engine

    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, width), torch.nn.SiLU(), torch.nn.Linear(width, 7), torch.nn.Linear(7, 4)
    )
    model.register_buffer("table", torch.arange(3.0))
    if lora:
        model[0].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": dtype == "bf16"},
        # DeepSpeed's stage 3 pads uneven gradients with uninitialised memory, which the norm takes in
        "gradient_clipping": 0.0 if zero_stage == 3 else 0.1,
        "zero_allow_untested_optimizer": True,
    }
    return start_engine(model, _optimizer_over, config, mesh)


def _optimizer_over(tensors: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in tensors.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in tensors.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=LR)


def train(engine: TrainEngine, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        inputs = torch.randn(2, 8, generator=generator).to(next(engine.module.parameters()).dtype)
        loss = engine(inputs).float().square().mean()
        engine.backward(loss)
        engine.step(LR)
        losses.append(loss.item())
    return losses


def save(
    mesh: ProcessMesh,
    engine: TrainEngine,
    run_directory: Path,
    *,
    step: int,
    lora: bool = False,
    average: ExponentialMovingAverage | None = None,
) -> Path:
    return begin(mesh, engine, run_directory, step=step, lora=lora, average=average)()


def begin(
    mesh: ProcessMesh,
    engine: TrainEngine,
    run_directory: Path,
    *,
    step: int,
    lora: bool = False,
    average: ExponentialMovingAverage | None = None,
    writer: BackgroundWriter | None = None,
) -> Callable[[], Path]:
    from sat_train.checkpoint.run_state import RunState
    from sat_train.checkpoint.save import begin_save

    fragments = engine.fragments()
    if writer is not None:
        engine.before_update = writer.wait_until_copied
    state = RunState(
        weights=engine.weights(left_out=frozen_names(engine.module) if lora else ()),
        pieces=engine.pieces(left_out=frozen_names(engine.module) if lora else ()),
        fragments=fragments if average is None else average.add_tensors(fragments),
        client_state={"smoothed_loss": 0.5, "names": ["a", "b"]},
    )
    return begin_save(
        mesh,
        state=state,
        run_directory=run_directory,
        writer=writer,
        manifest=Manifest(
            step=step,
            samples_consumed=2 * mesh.data_size * step,
            world_size=mesh.world_size,
            data_size=mesh.data_size,
            model_size=mesh.model_size,
            dtype=dtype_name(next(engine.module.parameters()).dtype),
            trainable_only=lora,
            config_digest="c" * 64,
            data_fingerprint="d" * 64,
            base_weights=BASE if lora else None,
            versions={},
        ),
    )


def find(mesh: ProcessMesh, save_root: Path) -> ResumePoint | None:
    return on_rank_0(
        mesh,
        lambda: find_resume_point(
            "auto", save_root=save_root, experiment_name="exp", is_alive=lambda folder: False
        ),
    )


def load(
    mesh: ProcessMesh, engine: TrainEngine, save_root: Path, base: BaseWeights = BASE
) -> tuple[ResumePoint, SavedFragments]:
    point = find(mesh, save_root)
    assert point is not None
    return point, load_point(mesh, engine, point, base)


def load_point(
    mesh: ProcessMesh, engine: TrainEngine, point: ResumePoint, base: BaseWeights = BASE
) -> SavedFragments:
    from sat_train.checkpoint.load import open_trained_state

    saved = open_trained_state(mesh, point=point, trained=engine.trained_shapes(), base_weights=base)
    engine.load(saved, step=point.step, counters={})
    return saved


def new_run(mesh: ProcessMesh, save_root: Path) -> Path:
    run_directory = save_root / "exp-20260101-000000"
    on_rank_0(mesh, lambda: run_directory.mkdir(parents=True))
    return run_directory


def _saved(path: Path, weights: Mapping[str, torch.Tensor]) -> bytes:
    """Returns what a file of whole weights holds."""
    from sat_train.checkpoint.torch_file import write_tensors

    named = {SAT_PREFIX + name: tensor for name, tensor in weights.items()}
    write_file(path, lambda file: write_tensors({"module": named}, file))
    return path.read_bytes()


def _check_no_buffer_is_shared(engine: TrainEngine) -> None:
    """A forward pass may change a buffer while a save still reads."""
    whole = [run for piece in engine.pieces() or () for run in piece.tensors.values()]
    saved = {tensor.data_ptr() for tensor in (*whole, *(engine.weights() or {}).values())}
    assert engine.module.get_buffer("table").data_ptr() not in saved


def _resumes_are_exact(mesh: ProcessMesh, root: Path) -> None:
    for zero_stage, dtype, lora in CASES:
        _resume_is_exact(mesh, root, zero_stage, dtype, lora)


def _resume_is_exact(mesh: ProcessMesh, root: Path, zero_stage: int, dtype: str, lora: bool) -> None:
    from sat_train.checkpoint.background import BackgroundWriter
    from sat_train.checkpoint.load import read_client_state

    save_root = root / f"{zero_stage}-{dtype}-{lora}"
    run_directory = new_run(mesh, save_root)
    engine = build_engine(mesh, zero_stage=zero_stage, dtype=dtype, lora=lora)
    waiting = new_run(mesh, root / f"{save_root.name}-waiting")
    writer = BackgroundWriter(only_with_room=False)
    for step in (1, 3):  # the second copy takes the memory of the first
        train(engine, mesh.rank, range(step // 2, step))
        gathered = gathered_weights(engine, frozen_names(engine.module) if lora else ())
        waited = save(mesh, engine, waiting, step=step, lora=lora)
        commit = begin(mesh, engine, run_directory, step=step, lora=lora, writer=writer)
        straight = train(engine, mesh.rank, range(3, 6)) if step == 3 else []
        assert read_manifest(commit()).files == read_manifest(waited).files, "the same bytes"
        if zero_stage == 3:
            assert (waited / model_file_name(0)).read_bytes() == _saved(waited / "gathered.pt", gathered)
        _check_no_buffer_is_shared(engine)

    # frozen weights come from the base; all else must come from the checkpoint, whatever was there before
    resumed = build_engine(mesh, zero_stage=zero_stage, dtype=dtype, lora=lora, seed=0 if lora else 1)
    point, _ = load(mesh, resumed, save_root)
    assert train(resumed, mesh.rank, range(3, 6)) == straight
    assert (point.step, point.manifest.samples_consumed) == (3, 6 * mesh.data_size)
    assert read_client_state(point) == {"smoothed_loss": 0.5, "names": ["a", "b"]}


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_bit_exact(rank_pool: Callable[..., Any], tmp_path: Path, world_size: int) -> None:
    rank_pool(world_size)(_resumes_are_exact, tmp_path)


def _bytes_of_fragments(mesh: ProcessMesh, save_root: Path, zero_stage: int) -> int:
    engine = build_engine(mesh, zero_stage=zero_stage, dtype="fp32", lora=False, width=4096)
    train(engine, mesh.rank, range(1))
    folder = save(mesh, engine, new_run(mesh, save_root), step=1)
    return (folder / fragments_file_name(mesh.rank)).stat().st_size


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_element_is_written_once_by_all_ranks_together(
    rank_pool: Callable[..., Any], tmp_path: Path, zero_stage: int
) -> None:
    written = sum(rank_pool(2)(_bytes_of_fragments, tmp_path, zero_stage))
    elements = 8 * 4096 + 4096 + 4096 * 7 + 7 + 7 * 4 + 4
    assert 12 * elements <= written < 1.1 * 12 * elements  # master and two moments, fp32


def _save_only(mesh: ProcessMesh, save_root: Path, lora: bool) -> None:
    engine = build_engine(mesh, zero_stage=2, dtype="fp32", lora=lora)
    train(engine, mesh.rank, range(1))
    save(mesh, engine, new_run(mesh, save_root), step=1, lora=lora)


def _load_refused(mesh: ProcessMesh, save_root: Path, options: dict[str, Any], base_sha256: str) -> str:
    engine = build_engine(mesh, **{"zero_stage": 2, "dtype": "fp32", "lora": False, **options})
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load(mesh, engine, save_root, BaseWeights(source="ours.safetensors", sha256=base_sha256))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    return str(caught.value)


def test_what_does_not_fit_is_refused_by_name(rank_pool: Callable[..., Any], tmp_path: Path) -> None:
    rank_pool(2)(_save_only, tmp_path / "full", False)
    rank_pool(2)(_save_only, tmp_path / "lora", True)

    def refusal(world_size: int, kind: str, sha256: str = "b" * 64, **options: Any) -> str:
        messages = rank_pool(world_size)(_load_refused, tmp_path / kind, options, sha256)
        assert len(set(messages)) == 1, "all ranks must say the same"
        return str(messages[0])

    wider = refusal(2, "full", width=32)
    assert "mismatched  0.weight: the model has [32, 8], the file [16, 8]" in wider
    assert "0 missing, 0 unexpected, 3 of another shape" in wider
    assert "unexpected  0.weight [16, 8]" in refusal(2, "full", lora=True)
    assert "was trained on base weights base.safetensors" in refusal(2, "lora", sha256="e" * 64, lora=True)


FORGERIES: dict[str, Any] = {
    "numbers": {"fragments": 1},
    "another table": {"step": [1, 2]},
    "a fragment of numbers": {"fragments": [1, 2]},
    "an offset beyond": {"fragments": [_fragment("0.weight", offset=10**12)]},
    "elements twice": {"fragments": [_fragment("0.weight"), _fragment("0.weight")]},
    "a matrix": {"fragments": [_fragment("0.weight", values=torch.zeros(16, 8))]},
    "whole numbers": {"fragments": [_fragment("0.weight", values=torch.zeros(128, dtype=torch.int64))]},
    "a shape of texts": {"fragments": [_fragment("0.weight", shape=("16", "8"))]},
    "a tensor as a counter": {"fragments": [_fragment("0.weight", scalars={"step": torch.zeros(10**6)})]},
}


def _load_forgery(mesh: ProcessMesh, save_root: Path, forgery: Any) -> str:
    engine = build_engine(mesh, zero_stage=1, dtype="fp32", lora=False)
    train(engine, mesh.rank, range(1))
    folder = save(mesh, engine, new_run(mesh, save_root), step=1)
    point = find(mesh, save_root)
    assert point is not None
    if mesh.rank == 0:
        torch.save(forgery, folder / fragments_file_name(1))
    on_rank_0(mesh, lambda: None)
    with pytest.raises(CheckpointError) as caught:
        load_point(mesh, engine, point)
    return str(caught.value)


def test_fragments_that_a_stranger_wrote_are_refused_by_their_file_on_all_ranks(
    rank_pool: Callable[..., Any], tmp_path: Path
) -> None:
    for name, forgery in FORGERIES.items():
        messages = rank_pool(2)(_load_forgery, tmp_path / name, forgery)
        assert messages[0] == messages[1], name
        assert str(tmp_path / name) in messages[0], name


def _a_failed_write_is_agreed(
    mesh: ProcessMesh, save_root: Path, zero_stage: int, failing: str, in_background: bool
) -> str:
    """Saves where one file of one rank cannot be written.

    Args:
        failing: Name of the file, which only one rank writes.
    """
    from sat_train.checkpoint import save as saving
    from sat_train.checkpoint.background import BackgroundWriter

    engine = build_engine(mesh, zero_stage=zero_stage, dtype="fp32", lora=False)
    run_directory = new_run(mesh, save_root)
    save(mesh, engine, run_directory, step=1)
    train(engine, mesh.rank, range(1))

    def full_disk(path: Path, write: Any) -> Any:
        if path.name == failing:
            raise OSError(28, "No space left on device")
        return write_file(path, write)

    honest, saving.write_file = saving.write_file, full_disk
    writer = BackgroundWriter(only_with_room=False) if in_background else None
    commit = begin(mesh, engine, run_directory, step=2, writer=writer)
    train(engine, mesh.rank, range(1, 2))
    with pytest.raises(CheckpointError) as caught:
        commit()
    saving.write_file = honest
    assert not (run_directory / "2").exists()
    assert not list(run_directory.glob(".tmp-2-*"))
    # training continues, and so does saving
    save(mesh, engine, run_directory, step=3)
    point = find(mesh, save_root)
    assert point is not None
    assert point.step == 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("zero_stage", "failing", "rank"),
    [
        (2, "fragments_rank_01.pt", 1),
        (3, "pieces_rank_01.pt", 1),
        (3, "fragments_rank_00.pt", 0),
        (3, "mp_rank_00_model_states.pt", 0),
    ],
)
def test_one_rank_that_cannot_write_fails_the_save_on_all(
    rank_pool: Callable[..., Any], tmp_path: Path, zero_stage: int, failing: str, rank: int
) -> None:
    for in_background in (False, True):
        root = tmp_path / str(in_background)
        messages = rank_pool(2)(_a_failed_write_is_agreed, root, zero_stage, failing, in_background)
        assert messages[0] == messages[1]
        assert f"rank {rank}: {failing}: No space left on device" in messages[0]


def _fails_alone(
    mesh: ProcessMesh, save_root: Path, zero_stage: int, failing: int, disk_is_full: bool
) -> None:
    """Trains until one rank fails while another has not yet written its files of step 2, and may not."""
    from sat_train.checkpoint import save as saving
    from sat_train.checkpoint.background import BackgroundWriter
    from sat_train.training.callbacks.checkpoint import Checkpointer
    from sat_train.training.loop.callback import Callback
    from sat_train.training.loop.meter import Meter
    from sat_train.training.loop.state import TrainState
    from sat_train.training.loop.trainer import Trainer

    run_directory, writer = new_run(mesh, save_root), BackgroundWriter(only_with_room=False)
    failed = save_root / "failed"

    class FailsAtStep3(Callback):
        def step_done(self, trainer: Any) -> None:
            if mesh.rank == failing and trainer.state.step == 3:
                raise AttributeError("broken on one rank")

        def failed(self, error: BaseException) -> None:
            failed.touch()

    def write_late(path: Path, write: Any) -> Any:
        wait_until(failed.exists)
        if disk_is_full:
            raise OSError(28, "No space left on device")
        return write_file(path, write)

    if mesh.rank != failing:
        saving.write_file = write_late
    config = toy_run(batch_size=2, zero_stage=zero_stage)
    engine, train_step, _ = build_toy(mesh, config, is_saving=mesh.rank != failing)

    def save(trainer: Any, *, in_background: bool) -> Callable[[], Path]:
        return begin(mesh, engine, run_directory, step=trainer.state.step, writer=writer)

    checkpointer = Checkpointer(
        mesh,
        run_directory,
        save,
        interval=2,
        keep_last=0,
        keep_every=0,
        in_background=True,
        finish_alone=writer.finish_alone,
    )
    trainer = Trainer(
        train_step=train_step,
        meter=Meter(mesh),
        learning_rate=CONSTANT,
        train_iters=10,
        log_interval=1,
        state=TrainState(),
        callbacks=[FailsAtStep3(), checkpointer],
    )
    trainer.run()


@pytest.mark.parametrize(
    ("zero_stage", "failing", "disk_is_full"), [(1, 0, False), (3, 0, False), (3, 1, False), (1, 1, True)]
)
def test_a_save_in_flight_is_finished_when_one_rank_fails_alone_unless_a_write_fails(
    rank_pool: Callable[..., Any], tmp_path: Path, zero_stage: int, failing: int, disk_is_full: bool
) -> None:
    with pytest.raises(FailedOnRank, match="broken on one rank"):
        rank_pool(2)(_fails_alone, tmp_path, zero_stage, failing, disk_is_full)
    steps = list(tmp_path.glob("exp-*/2"))
    assert len(steps) == (not disk_is_full)
    assert all(verify_checkpoint(step).step == 2 for step in steps)
    assert not list(tmp_path.glob("exp-*/.tmp-*"))


def _killed_in_a_save(mesh: ProcessMesh, save_root: Path) -> None:
    from sat_train.checkpoint import save as saving
    from sat_train.checkpoint.background import BackgroundWriter

    engine = build_engine(mesh, zero_stage=3, dtype="fp32", lora=False)
    run_directory = new_run(mesh, save_root)
    save(mesh, engine, run_directory, step=1)
    train(engine, mesh.rank, range(1))
    if mesh.rank == 1:
        saving.write_file = lambda path, write: os.kill(os.getpid(), signal.SIGKILL)
    begin(mesh, engine, run_directory, step=2, writer=BackgroundWriter(only_with_room=False))()


def _resumed_step(mesh: ProcessMesh, save_root: Path) -> int:
    return load(mesh, build_engine(mesh, zero_stage=3, dtype="fp32", lora=False), save_root)[0].step


def test_a_rank_killed_in_a_save_leaves_the_earlier_checkpoint(
    rank_pool: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(FailedOnRank):
        rank_pool(2)(_killed_in_a_save, tmp_path)
    assert rank_pool(2)(_resumed_step, tmp_path) == [1, 1]
