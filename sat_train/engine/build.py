"""Config -> the engine around the DiT alone. T5 and the VAE never enter it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from sat_train.collector import collector_off
from sat_train.config import RunConfig
from sat_train.config.rules import check_on_device
from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.compilation import compile_where_asked
from sat_train.engine.engine import TrainEngine
from sat_train.engine.optim.build import build_optimizer
from sat_train.engine.owned import OwnedParameters, padded_rows
from sat_train.engine.reduction import reduction_settings
from sat_train.engine.slots import partition_slots
from sat_train.engine.undivided import UndividedParameters, is_undivided_with
from sat_train.log import get_logger
from sat_train.models.trainable import adapter_rules, group_parameters, group_table, train_rules

log = get_logger(__name__)


def build_engine(config: RunConfig, dit: nn.Module, mesh: ProcessMesh) -> TrainEngine:
    """Builds the optimizer of the trained weights, and hands it and the DiT to DeepSpeed.

    No learning-rate scheduler goes with them: `Trainer` sets the rate before each step.

    Returns:
        The engine; its `module` is `dit` itself, moved to the device and cast.

    Raises:
        ConfigError: Stage, precision and compilation do not go together.

    Ranks: all.
    """
    check_on_device(config, mesh.device.type)
    compile_where_asked(dit, config.args, mesh.device)
    choice = config.deepspeed.optimizer
    rules = (*train_rules(config.model.train), *adapter_rules(config.spec.adapter))
    groups = group_parameters(dit, weight_decay=choice.params.weight_decay, rules=rules)
    if rules:
        log.info("learning rates, at their highest:\n%s", group_table(groups, dit, lr=choice.params.lr))
    optimizer_over = partial(build_optimizer, choice, groups)
    trained = sum(parameter.numel() for parameter in dit.parameters() if parameter.requires_grad)
    return start_engine(dit.to(mesh.device), optimizer_over, engine_config(config, mesh, trained), mesh)


def start_engine(
    module: nn.Module,
    optimizer_over: Callable[[Mapping[str, Tensor]], torch.optim.Optimizer],
    settings: dict[str, Any],
    mesh: ProcessMesh,
) -> TrainEngine:
    """Starts DeepSpeed in the layout of its stage.

    Stage 0 steps the parameters (`undivided.py`), stages 1 and 2 step those that a rank owns (`owned.py`),
    and stage 3 steps DeepSpeed's vectors of pieces.

    Args:
        module: The transformer, on its device.
        optimizer_over: Returns the optimizer over named parameters.
        settings: DeepSpeed's dictionary.
        mesh: The process mesh.

    Ranks: all.
    """
    initialize = partial(
        import_deepspeed().initialize,
        model=module,
        mpu=SatMesh(mesh) if mesh.model_size > 1 else None,
        dist_init_required=False,
    )
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if is_undivided_with(settings, mesh):
        max_norm = settings.get("gradient_clipping", 1.0)  # DeepSpeed's default
        undivided = UndividedParameters(optimizer_over(trained), trained.values(), max_norm=max_norm)
        # DeepSpeed's stage 0 has no dtype of accumulation: that of fp32 weights is theirs
        of_stage_0 = {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0, "data_types": {}}
        engine = initialize(config={**settings, **of_stage_0}, optimizer=undivided)[0]
        engine.enable_backward_allreduce = mesh.data_size > 1  # else it copies gradients for nobody
        return TrainEngine(engine, mesh)
    if settings["zero_optimization"]["stage"] == 3:
        return TrainEngine(initialize(config=settings, optimizer=optimizer_over(trained))[0], mesh)
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if OwnedParameters not in ZERO_SUPPORTED_OPTIMIZERS:  # it would warn of one that it does not know
        ZERO_SUPPORTED_OPTIMIZERS.append(OwnedParameters)
    with padded_rows(module, mesh.data_size) as parameters:
        optimizer = OwnedParameters(parameters)
        engine = initialize(config=settings, optimizer=optimizer)[0]
    optimizer.bind(partition_slots(engine), optimizer_over)
    return TrainEngine(engine, mesh)


def import_deepspeed() -> ModuleType:
    """Returns DeepSpeed, without its side effects at import. Call it after the processes are started.

    DeepSpeed looks for the accelerator once, when it is imported.
    """
    with collector_off():
        import deepspeed

    # on the CPU it would compile a collective of its own at start, which gloo has already; a process killed
    # meanwhile leaves a lock that all later ones wait for, without end
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    keep_deepspeed_from_nvml(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    _import_muon_uncompiled()
    from deepspeed.runtime.zero import linear

    linear.LinearFunctionForZeroStage3.forward = staticmethod(_linear)
    return cast(ModuleType, deepspeed)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the linear layer of ZeRO-3, by which DeepSpeed replaces torch's in the whole process.

    Its own adds the bias in place: to a product that a block has kept for its backward pass it would be added
    again, when the block is computed a second time.

    Source: microsoft/DeepSpeed@v0.19.8 `runtime/zero/linear.py` `LinearFunctionForZeroStage3.forward`.
    """
    if input.dim() == 2 and bias is not None:
        return torch.addmm(bias, input, weight.t())
    output = input.matmul(weight.t())
    return output if bias is None else output + bias


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, which its engine imports to ask whether it is in use, without the compiler.

    Its kernels are decorated for torch.compile, whose import takes each rank more than a second and 50 MB.
    """
    from deepspeed.runtime import compiler

    compile_kernels = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_kernels


def keep_deepspeed_from_nvml(visible_devices: str) -> None:
    """Makes DeepSpeed ask torch for free memory where GPUs are named by UUID, as MIG, PBS and Kubernetes do.

    With pynvml installed it would read each name as a number, and end in ZeRO's constructor.

    Args:
        visible_devices: `CUDA_VISIBLE_DEVICES`; empty when unset.
    """
    if visible_devices and not all(name.strip().isdecimal() for name in visible_devices.split(",")):
        from deepspeed.accelerator import cuda_accelerator

        cuda_accelerator.pynvml = None


def engine_config(config: RunConfig, mesh: ProcessMesh, trained: int) -> dict[str, Any]:
    """Returns DeepSpeed's dictionary: the section, with features that compile or synchronise switched off.

    Args:
        config: The configuration.
        mesh: The process mesh.
        trained: Weights of this rank that train.
    """
    section = config.deepspeed
    zero = section.zero_optimization.model_dump(exclude={"offload_optimizer", "offload_param"})
    on_gpu = mesh.device.type == "cuda"
    zero |= reduction_settings(section, trained=trained, data_ranks=mesh.data_size, on_gpu=on_gpu)
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(section.zero_optimization, name)
        if offload.device != "none":
            zero[name] = offload.model_dump()
    return {
        "train_micro_batch_size_per_gpu": section.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "gradient_clipping": section.gradient_clipping,
        "zero_optimization": zero,
        "communication_data_type": section.communication_data_type,
        "data_types": section.data_types.model_dump(),
        "fp16": section.fp16.model_dump(),
        "bf16": section.bf16.model_dump(),
        "zero_allow_untested_optimizer": section.zero_allow_untested_optimizer,
        # a torch optimizer on offloaded states is slower than DeepSpeed's, but needs no compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": section.steps_per_print,
        "wall_clock_breakdown": section.wall_clock_breakdown,
        # its throughput timer synchronises the device at every step
        "timers": {"throughput": {"enabled": section.wall_clock_breakdown}},
    }


class SatMesh:
    """The process mesh behind the interface that DeepSpeed expects."""

    def __init__(self, mesh: ProcessMesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.model_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model_size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.model_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data_size

    def get_data_parallel_group(self) -> Any:
        return self._mesh.data_group
