"""A step of the trainer that SwissArmyTransformer ships, on any SAT model."""

import sys
from argparse import Namespace
from contextlib import ExitStack
from types import ModuleType
from unittest.mock import patch

import torch

from sat_train.engine.build import import_deepspeed


def step(dit, compute_loss, adamw, *, max_norm):
    """Returns a step of SAT's trainer, with DeepSpeed as CogVideo's `sat/configs/sft.yaml` sets it up.

    In fp32, for a CPU; its timers' synchronization with a GPU, which is missing, is left out.
    """
    sys.modules.setdefault("wandb", ModuleType("wandb"))  # imported there, but neither declared nor used here
    from sat.training.deepspeed_training import get_optimizer_param_groups, train_step
    from sat.training.learning_rates import AnnealingLR
    from sat.training.utils import Timers

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": False,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 1_000_000_000,
        },
    }
    engine, optimizer, _, _ = import_deepspeed().initialize(
        model=dit,
        model_parameters=get_optimizer_param_groups(dit),
        optimizer=adamw,
        config=config,
        dist_init_required=False,
    )
    args = Namespace(deepspeed=True, fp16=False, profiling=-1, world_size=1)
    schedule = AnnealingLR(optimizer, start_lr=1e-5, warmup_iter=1, num_iters=10**6, decay_style="linear")
    timers, hooks = Timers(), {"forward_step": lambda _, model, *rest: compute_loss(model)}

    def one_step():
        with ExitStack() as stack:
            if not torch.cuda.is_available():
                stack.enter_context(patch("torch.cuda.synchronize"))
            train_step(None, engine, optimizer, schedule, args, timers, hooks=hooks)

    return one_step
