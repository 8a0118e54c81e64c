"""The plan of a run agrees with what engines and passes really hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sat_train.checkpoint.manifest import BaseWeights
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import ProcessMesh

pytestmark = pytest.mark.ranks

MODEL = "configs/model/cogvideox_tiny.yaml"
SMALL = ["data.params.max_num_frames=5", "args.batch_size=1", "args.bf16=true"]
CLOSE = 0.05


def _config(recipe: str, *words: str) -> RunConfig:
    files = [MODEL, f"configs/{recipe}.yaml"]
    return load_run_config(files, [*SMALL, *words], purpose="check", check_paths=False)


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def _inputs(config: RunConfig, dit: Any) -> dict[str, Tensor]:
    spec, data = config.spec, config.require_data().params
    latent = spec.latent(data.max_num_frames, *data.video_size)
    size = (1, latent.padded_frames, spec.in_channels, latent.height, latent.width)
    text = torch.randn(1, spec.text.max_length, spec.text_width, dtype=dit.dtype)
    return {"latent_btchw": torch.randn(size), "timesteps_b": torch.tensor([500]), "text_bld": text}


BASE = BaseWeights(source="elsewhere", sha256="0" * 64)  # few bits are for a base that is kept elsewhere


def _gradients(engine: Any, stage: int) -> list[Tensor]:
    """Returns what an engine has of gradients after a backward pass, without those in host memory."""
    zero = engine._engine.optimizer
    if stage == 3:
        return [] if zero.offload_optimizer else [zero.grad_partitions_flat_buffer]
    own = [each.grad for each in engine.module.parameters() if each.grad is not None]
    averaged = zero.averaged_gradients.get(0) if stage else None
    return own + (averaged or [])


def _states_as_planned(mesh: ProcessMesh, recipe: str, stage: int, *words: str) -> None:
    from sat_train.engine.build import build_engine
    from sat_train.engine.slots import base_optimizer
    from sat_train.models.frozen_layers import FrozenLayer, SwappedWeight
    from sat_train.planning.gpu_memory import count_states, count_weights
    from sat_train.training.models import StartWeights, build_trained_dit

    sums = ("deepspeed.data_types.grad_accum_dtype=fp32",) if recipe == "lora" and stage >= 2 else ()
    single = () if stage else ("args.bf16=false",)  # stage 0 takes fp32 alone
    config = _config(recipe, f"args.zero_stage={stage}", *sums, *single, *words)
    planned = count_states(config, count_weights(config), data_ranks=mesh.data_size)
    engine = build_engine(config, build_trained_dit(config, mesh, StartWeights(base=BASE)), mesh)
    held_bytes = 0
    for _ in range(config.args.gradient_accumulation_steps):
        engine.backward(engine(**_inputs(config, engine.module)).float().square().mean())
        held_bytes = max(held_bytes, _storage_bytes(_gradients(engine, stage)))
    assert held_bytes == pytest.approx(planned.gradients, rel=CLOSE), (stage, words)
    if stage:
        buckets = 1 if stage == 3 else 2  # two GPUs reduce while the backward pass continues
        zero = engine._engine.optimizer
        travelling = getattr(zero, "temp_grad_buffer_for_gpu_offload", torch.empty(0)).numel()
        assert 2 * (buckets * zero.reduce_bucket_size + travelling) == planned.buffers
    engine.step(1e-3)

    parameters = list(engine.module.parameters())
    weights = _storage_bytes([getattr(each, "ds_tensor", each.data) for each in parameters])
    frozen = [layer.held for layer in engine.module.modules() if isinstance(layer, FrozenLayer)]
    weights += _storage_bytes([tensor for held in frozen for tensor in held.tensors()])
    optimizer = base_optimizer(engine._engine)
    held = [slot.flat for slot in engine.slots] if stage else []  # at stage 0 these are the weights
    held += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert weights == pytest.approx(planned.weights, rel=CLOSE)
    swaps = {held.swap for held in frozen if isinstance(held, SwappedWeight)}
    assert sum(swap.host_bytes for swap in swaps) == planned.swapped
    assert _storage_bytes(held) == pytest.approx(planned.optimizer + planned.offloaded, rel=CLOSE)
    copies = _copies_of_offload(engine, stage) if planned.offloaded else []
    assert _storage_bytes(copies) == pytest.approx(planned.offloaded_copies, rel=CLOSE)


def _copies_of_offload(engine: Any, stage: int) -> list[Tensor]:
    """Returns what DeepSpeed keeps in host memory besides masters and states."""
    zero = engine._engine.optimizer
    if stage == 3:
        return [zero.grad_partitions_flat_buffer, *(each.grad for each in zero.fp32_partitioned_groups_flat)]
    copies = [*zero.param_buffer_of_bit16_for_cpu_offload_groups, *zero.accumulated_grads_in_cpu.values()]
    return copies + [each.grad for each in zero.single_partition_of_fp32_groups]


@pytest.mark.parametrize("recipe", ["sft", "lora"])
def test_lasting_bytes_are_those_of_the_engine(rank_pool: Callable[..., Any], recipe: str) -> None:
    for stage in range(4):
        rank_pool(2)(_states_as_planned, recipe, stage)
    rank_pool(2)(_states_as_planned, recipe, 1, "args.gradient_accumulation_steps=2")
    if recipe == "sft":
        offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        for stage in (1, 2, 3):
            rank_pool(2)(_states_as_planned, recipe, stage, offload)
        for stage in (1, 2):
            rank_pool(2)(_states_as_planned, recipe, stage, offload, "args.gradient_accumulation_steps=2")
    if recipe == "lora":
        rank_pool(2)(_states_as_planned, recipe, 2, "args.quantize_base=nf4", "args.block_swap=3")


def _passes_as_planned(mesh: ProcessMesh) -> None:
    from sat_train.models.meters import LivingTensors
    from sat_train.planning.counting import count_passes
    from sat_train.training.models import StartWeights, build_trained_dit
    from tests.networks import norms_as_on_a_gpu

    policies = [("sft", policy, "off") for policy in ("off", "gemm", "attention", "full")]
    policies += [("lora", "full", "off"), ("lora", "off", "nf4")]
    runs = [(recipe, f"args.checkpoint_activations={policy}", kind) for recipe, policy, kind in policies]
    runs += [("sft", "args.checkpoint_budget=0.5", "off"), ("lora", "args.checkpoint_budget=0.3", "off")]
    for recipe, policy, kind in runs:
        config = _config(recipe, policy, f"args.quantize_base={kind}")
        dit = build_trained_dit(config, mesh, StartWeights(base=BASE))
        inputs = _inputs(config, dit)
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
        with norms_as_on_a_gpu(), LivingTensors(dit) as living:
            dit(**inputs).float().square().mean().backward()
        planned = count_passes(config, batch_size=1).peak
        assert living.peak == pytest.approx(planned, rel=CLOSE), (recipe, policy, kind)


def test_activations_of_all_layers_are_those_that_two_and_four_layers_predict(
    rank_pool: Callable[..., Any],
) -> None:
    rank_pool(1)(_passes_as_planned)


def _settle(mesh: ProcessMesh, free: list[float]) -> Any:
    from sat_train.planning import activations

    config = _config("sft", "args.checkpoint_activations=auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "free_memory", lambda device: free[mesh.rank])
        args = activations.settle_for_gpus(config, mesh).args
    return args.checkpoint_activations, args.checkpoint_budget


@pytest.mark.parametrize(
    ("free", "policy"), [([1e12, 1e6], "full"), ([1e6, 1e12], "full"), ([1e12, 1e11], "off")]
)
def test_all_ranks_recompute_what_the_gpu_with_the_least_memory_must(
    rank_pool: Callable[..., Any], free: list[float], policy: str
) -> None:
    assert rank_pool(2)(_settle, free) == [(policy, None), (policy, None)]
