"""Report of `sat-train check --build`: a model's parameters by part, and the mixins behind SAT's hooks."""

from __future__ import annotations

import torch

from sat_train.config import RunConfig
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.models.build import build_dit
from sat_train.models.trainable import select_configured


def report_build(config: RunConfig) -> str:
    """Builds the whole transformer on the meta device, without memory, and describes it.

    Args:
        config: The configuration; parameters are counted for the whole model, whatever its tensor
            parallelism.

    Raises:
        ConfigError: A pattern of the configuration matches no weight.
    """
    start_single_process()
    dit = build_dit(config.spec, device="meta", dtype=torch.float32, initialize=False)
    counts = select_configured(dit, config.model)
    width = max(map(len, dit.hook_origins))
    hooks = [f"{hook:{width}}  {origin}" for hook, origin in sorted(dit.hook_origins.items())]
    stop_processes()
    return "\n".join(["", str(counts), "", "SAT hooks, and the mixins that answer them", *hooks])
