"""How DeepSpeed reads and writes its files here: complete or absent, hashed, and never by unpickling code.

DeepSpeed's own engine writes in place without syncing and reads with `weights_only=False`. Ours is put on
`engine.checkpoint_engine`, which is a plain attribute.

Source: microsoft/DeepSpeed@v0.19.8 `runtime/engine.py` `save_checkpoint`,
`runtime/checkpoint_engine/torch_checkpoint_engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from sat_train.checkpoint.layout import CLIENT_STATE_KEY, SAT_PREFIX
from sat_train.errors import CheckpointError, SatTrainError, printable
from sat_train.files import FileRecord, HashingFile, reading, write_file

# All that DeepSpeed's optimizer shards hold besides tensors and plain values.
SAFE_CLASSES = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]

State = dict[str, Any]


def read_shard(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> State:
    """Reads one file of a checkpoint without running code from it.

    Args:
        path: A file that DeepSpeed or `ShardFiles` wrote.
        map_location: As for `torch.load`.
        mmap: Map the tensors from the file instead of reading them: for looking, or for one pass over large
            files.
    """
    with (
        reading(path, error=CheckpointError, expected="a file that sat_train wrote, without code in it"),
        torch.serialization.safe_globals(SAFE_CLASSES),
    ):
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    return cast(State, state)


class ShardFiles(CheckpointEngine):  # type: ignore[misc]
    """Writes and reads DeepSpeed's files, and keeps a record of what it wrote.

    `save` never raises: a rank that left `engine.save_checkpoint` early would leave the others in its closing
    barrier. The first failure is in `failure`, for the ranks to compare afterwards.

    `module` is stored under SAT's key prefix, so SAT itself can read the step folder, and handed back without
    it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "sat_train"
        self.written: list[FileRecord] = []
        self.failure = ""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._fail(path, error)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare: the folder is there."""

    def save(self, state_dict: State, path: str | Path) -> None:
        if self.failure:
            return

        def write(file: HashingFile) -> None:
            torch.save(_with_sat_keys(state_dict), cast(IO[bytes], file))

        try:
            self.written.append(write_file(Path(path), write))
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            self._fail(path, error)

    def load(self, path: str | Path, map_location: Any = None) -> State:
        return without_sat_keys(read_shard(Path(path), map_location=map_location))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Committing is the folder's rename, in `publish`."""
        return True

    def _fail(self, path: str | Path, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)[:300]
        self.failure = f"{Path(path).name}: {reason}"


def _with_sat_keys(state: State) -> State:
    if not isinstance(state.get("module"), Mapping):
        return state
    return {**state, "module": {SAT_PREFIX + key: value for key, value in state["module"].items()}}


def without_sat_keys(state: State) -> State:
    """Returns a model-states file as DeepSpeed wrote it."""
    if not isinstance(state.get("module"), Mapping):
        return state
    return {
        **state,
        "module": {key.removeprefix(SAT_PREFIX): value for key, value in state["module"].items()},
    }


def save_engine(
    engine: Any, *, folder: Path, client_state: Mapping[str, object], exclude_frozen: bool
) -> ShardFiles:
    """Writes all that a DeepSpeed engine needs to resume into `folder`, which exists.

    Returns:
        What this rank wrote, and its failure if it had one.

    Ranks: all.
    """
    files = ShardFiles()
    engine.checkpoint_engine = files
    # a script beside the weights that people run by hand: it cannot read these files, and on a full disk it
    # raises on rank 0 alone
    engine._copy_recovery_script = lambda save_path: None
    engine.save_checkpoint(
        str(folder.parent),
        tag=folder.name,
        client_state={CLIENT_STATE_KEY: dict(client_state)},
        save_latest=False,
        exclude_frozen_parameters=exclude_frozen,
    )
    return files


def load_engine(
    engine: Any, *, run_directory: Path, step: int, exclude_frozen: bool, files: ShardFiles
) -> State:
    """Loads weights, masters, optimizer and schedule into a DeepSpeed engine.

    Args:
        engine: The engine.
        run_directory: The run directory.
        step: A committed step in it.
        exclude_frozen: The step holds no frozen weights.
        files: What reads them.

    Returns:
        The client state that `save_engine` was given.

    Raises:
        CheckpointError: The files are readable, but do not hold what DeepSpeed looks for in them.

    Ranks: all.
    """
    engine.checkpoint_engine = files
    try:
        path, state = engine.load_checkpoint(
            str(run_directory), tag=str(step), load_module_strict=not exclude_frozen
        )
    except SatTrainError:
        raise
    except Exception as error:  # whatever a stranger's file makes DeepSpeed stumble over
        raise CheckpointError(
            f"step {step} of {run_directory} cannot be loaded: "
            f"{type(error).__name__}: {printable(str(error))}",
            expected="the state of an optimizer, as sat_train writes it",
            remedy="resume from another step (args.resume=PATH/STEP), or begin from weights with args.load",
        ) from error
    assert path is not None, (
        f"DeepSpeed found no checkpoint {step} in {run_directory}, though its manifest verified"
    )
    return cast(State, state[CLIENT_STATE_KEY])


def optimized_shapes(engine: Any, *, exclude_frozen: bool) -> list[dict[str, tuple[int, ...]]]:
    """Returns names and shapes of what the optimizer holds, group by group, in the order ZeRO flattens them.

    Without ZeRO: one group, all that is saved of the module.
    """
    if engine.zero_optimization():
        return [_plain_shapes(group) for group in engine._get_zero_param_shapes()]
    frozen = {name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    module = engine.module.state_dict()
    left_out = frozen if exclude_frozen else set()
    return [{name: tuple(tensor.shape) for name, tensor in module.items() if name not in left_out}]


def saved_shapes(state: State) -> list[dict[str, tuple[int, ...]]]:
    """Returns what `optimized_shapes` gave when this file of weights was written."""
    groups = state.get("param_shapes")
    if groups:
        return [_plain_shapes(group) for group in groups]
    module = without_sat_keys(state)["module"]
    return [{name: tuple(tensor.shape) for name, tensor in module.items()}]


def _plain_shapes(group: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in group.items()}
