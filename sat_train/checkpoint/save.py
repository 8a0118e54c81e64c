"""Saving a training run: DeepSpeed's engine, the weight average, and where the run stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

import sat_train
from sat_train.checkpoint.engine_io import save_engine
from sat_train.checkpoint.layout import ema_file_name
from sat_train.checkpoint.manifest import BaseWeights, Manifest
from sat_train.checkpoint.publish import RankReport, expected_size, publish
from sat_train.distributed.processes import ProcessMesh

_PLAIN_TYPES = (type(None), bool, int, float, str, torch.Tensor)
# fp32 master and Adam's two moments
_OPTIMIZER_BYTES = 12


def save_training_checkpoint(
    mesh: ProcessMesh,
    *,
    engine: Any,
    run_directory: Path,
    step: int,
    samples_consumed: int,
    samples_waiting: Sequence[int] = (),
    client_state: Mapping[str, object],
    ema_state: Mapping[str, object] | None,
    exclude_frozen: bool,
    config_digest: str,
    data_fingerprint: str,
    base_weights: BaseWeights | None = None,
) -> Path:
    """Publishes everything that a run needs to continue as if it had never stopped.

    Args:
        engine: DeepSpeed engine.
        run_directory: The run directory.
        step: Optimizer steps done.
        samples_consumed: Samples that all ranks together have taken.
        samples_waiting: Samples that were passed over in the global order and are still to come.
        client_state: The same on all ranks; tensors and plain values only, so that loading never runs code.
        ema_state: This rank's part of the weight average; None on ranks that hold none.
        exclude_frozen: Leave out what does not train (LoRA).
        config_digest: `RunConfig.digest()`.
        data_fingerprint: Fingerprint of the data set.
        base_weights: Source and hash of the frozen weights, when they are left out.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: On all ranks alike; training may continue, what was saved before is intact.

    Ranks: all.
    """
    _check_plain("state", {"client_state": client_state, "ema_state": ema_state})

    write = partial(_write_rank, engine, client_state, ema_state, exclude_frozen, mesh.rank)
    manifest = partial(
        Manifest,
        step=step,
        samples_consumed=samples_consumed,
        samples_waiting=tuple(samples_waiting),
        world_size=mesh.world_size,
        data_size=mesh.data_size,
        model_size=mesh.model_size,
        zero_stage=int(engine.zero_optimization_stage()),
        trainable_only=exclude_frozen,
        config_digest=config_digest,
        data_fingerprint=data_fingerprint,
        base_weights=base_weights,
        versions=library_versions(),
    )
    size = expected_size(run_directory, _guess_bytes(engine.module, mesh.model_size, exclude_frozen))
    return publish(
        mesh, run_directory=run_directory, step=step, expected_bytes=size, write=write, describe=manifest
    )


def _write_rank(
    engine: Any,
    client_state: Mapping[str, object],
    ema_state: Mapping[str, object] | None,
    exclude_frozen: bool,
    rank: int,
    folder: Path,
) -> RankReport:
    files = save_engine(engine, folder=folder, client_state=client_state, exclude_frozen=exclude_frozen)
    if ema_state is not None:
        files.save(dict(ema_state), folder / ema_file_name(rank))
    return RankReport(files=files.written, failure=files.failure)


def library_versions() -> dict[str, str]:
    """Returns the versions of what wrote a checkpoint."""
    return {
        "sat_train": sat_train.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def _guess_bytes(module: torch.nn.Module, model_size: int, exclude_frozen: bool) -> int:
    total = 0
    for parameter in module.parameters():
        count = int(getattr(parameter, "ds_numel", parameter.numel()))
        if parameter.requires_grad:
            total += count * (parameter.element_size() + _OPTIMIZER_BYTES)
        elif not exclude_frozen:
            total += count * parameter.element_size()
    return total * model_size


def _check_plain(place: str, value: object) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(f"{place}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(f"{place}[{index}]", item)
    else:
        assert isinstance(value, _PLAIN_TYPES), (
            f"{place} is a {type(value).__name__}; it could not be loaded again"
        )
