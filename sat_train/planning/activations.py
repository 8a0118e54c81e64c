"""`args.checkpoint_activations: auto`: the share of activations that the GPUs have room to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from sat_train.config import RunConfig
from sat_train.config.hardware import find_hardware
from sat_train.config.parts.loss_term_parts import DIFFUSION
from sat_train.config.summary import describe_activations
from sat_train.distributed.collectives import gather_objects, on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.compilation import compiles_blocks
from sat_train.errors import SatTrainError
from sat_train.log import get_logger
from sat_train.models.meta_models import counts_modules
from sat_train.models.recomputation import keeping
from sat_train.planning.planner import Planner

log = get_logger(__name__)

FILLED = 0.95  # of a card: allocators lose some
SHARES = 20  # shares are tried in twentieths
_ANY_CARD = "h100"  # memory does not depend on how fast a card is


def largest_share(peak_of: Callable[[float], float], room: float) -> float | None:
    """Returns the largest share of activations that can be kept.

    Args:
        peak_of: Bytes of a GPU where this share is kept; they grow with it.
        room: Bytes that there are.

    Returns:
        From 0, where everything is recomputed, to 1; None where even that does not fit.
    """
    least, most = peak_of(0), peak_of(1)
    if least > room:
        return None
    steps, peak = SHARES, most
    while steps and peak > room:
        steps = max(steps - math.ceil((peak - room) / (most - least) * SHARES), 0)
        peak = peak_of(steps / SHARES)
    return steps / SHARES


def is_counted(config: RunConfig) -> bool:
    """Returns whether a plan counts all that a step keeps.

    It does not count what terms of the loss keep, nor modules whose inputs have a shape that is not known.
    """
    spec = config.spec
    return not set(spec.loss_terms) - {DIFFUSION} and (not spec.modules or counts_modules(config))


def settle(planner: Planner, config: RunConfig) -> RunConfig:
    """Returns a configuration that keeps as many activations as the planner's card has room for.

    It recomputes everything where nothing fits or not all is counted, and stays as it is without `auto`.
    """
    if not config.args.keeps_what_fits:
        return config
    share = share_that_fits(planner, config) if is_counted(config) else None
    return keeping(config, share or 0)


def share_that_fits(planner: Planner, config: RunConfig) -> float | None:
    """Returns the largest share of activations that the planner's card has room for; None if it fits none."""
    return largest_share(
        lambda share: planner.training_peak(keeping(config, share)), FILLED * planner.card.memory_gib * 2**30
    )


def free_memory(device: torch.device) -> float:
    """Returns the bytes of a GPU that this process may use; infinity on a CPU.

    They include what PyTorch holds already, which is part of the plan, or is given back.
    """
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + float(torch.cuda.memory_reserved(device))


def settle_for_gpus(config: RunConfig, mesh: ProcessMesh) -> RunConfig:
    """Returns a configuration that keeps as many activations as the GPUs of this run have room for.

    It is the same on all ranks, by the GPU with the least free memory; on a CPU it keeps all.

    Ranks: all; rank 0 counts.
    """
    if not config.args.keeps_what_fits:
        return config
    free = min(gather_objects(mesh, free_memory(mesh.device)))
    if math.isinf(free):
        return keeping(config, 1)
    counted = config if compiles_blocks(config.args, mesh.device) else _eager(config)
    share = on_rank_0(mesh, lambda: _counted_share(counted, mesh, free), may_take_long=True)
    settled = keeping(config, share)
    log.info("activations: %s (args.checkpoint_activations=auto)", describe_activations(settled.args))
    return settled


def _eager(config: RunConfig) -> RunConfig:
    return replace(config, args=config.args.model_copy(update={"compile": "off"}))


def _counted_share(config: RunConfig, mesh: ProcessMesh, free: float) -> float:
    if not is_counted(config):
        log.info("what terms of the loss and modules of extensions keep is not counted: all is recomputed")
        return 0
    log.info("counting which activations %.0f GB of GPU memory have room for", free / 1e9)
    try:
        card = replace(find_hardware(_ANY_CARD), memory_gib=free / 2**30)
        share = share_that_fits(Planner(card, mesh.world_size), config)
    except SatTrainError:
        raise
    except Exception as error:  # of a module that needs a device, or of the compiler: the run goes on without
        log.warning("this model cannot be counted: %s", str(error).partition("\n")[0])
        return 0
    if share is None:
        log.warning("this run may not fit the GPU; sat-train plan says what takes less memory")
    return share or 0
