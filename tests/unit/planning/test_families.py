"""Plans of the released models agree with what tensors on the meta device take, in eight of their blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.engine.optim.build import build_optimizer
from sat_train.engine.owned import owners, padded_rows
from sat_train.models.build import compute_dtype
from sat_train.models.meta_models import build_meta_dit, build_meta_inputs
from sat_train.models.meters import LivingTensors, flash_attention
from sat_train.models.trainable import group_parameters
from sat_train.planning.counting import count_passes
from sat_train.planning.gpu_memory import count_states, count_weights

FAMILIES = ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b_i2v")
POLICIES = ("off", "gemm", "attention", "full")
RANKS = 8
ACCUMULATED = "args.gradient_accumulation_steps=2"
CLOSE = 0.05


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    start_single_process()
    yield
    stop_processes()


def _read(family: str, recipe: str, *words: str) -> RunConfig:
    files = [f"configs/model/{family}.yaml", f"configs/{recipe}.yaml"]
    few = "model.network_config.params.num_layers=8"
    return load_run_config(files, (few, *words), purpose="check", check_paths=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_all_blocks_are_those_that_fewer_predict(family: str) -> None:
    for number, policy in enumerate(POLICIES, start=FAMILIES.index(family)):
        recipe = ("sft", "lora")[number % 2]  # each policy and each family meets both
        config = _read(family, recipe, f"args.checkpoint_activations={policy}")
        dit = build_meta_dit(config).train()
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
        with flash_attention(), LivingTensors(dit) as living:
            dit(**build_meta_inputs(config, 1)).float().square().mean().backward()
        assert count_passes(config, batch_size=1).peak == pytest.approx(living.peak, rel=CLOSE), policy


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recipe", ["sft", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lasting_bytes_are_those_of_tensors_and_of_a_step_of_the_optimizer(
    family: str, recipe: str, stage: int
) -> None:
    config = _read(family, recipe, f"args.zero_stage={stage}", "args.compile=off", ACCUMULATED)
    planned = count_states(config, count_weights(config), data_ranks=RANKS)
    dit = build_meta_dit(config).to(compute_dtype(config.args))  # adapters too, by DeepSpeed
    trained = {name: each for name, each in dit.named_parameters() if each.requires_grad}
    owned = {name: _share(each) for name, each in trained.items()}
    if stage < 3:
        of_rank = owners([each.numel() for each in trained.values()], RANKS)
        owned = {name: trained[name] for name, owner in zip(trained, of_rank, strict=True) if owner == 0}
    gradients = trained if stage == 1 else owned  # at stage 1 from one micro-step to the next
    assert sum(each.nbytes for each in gradients.values()) == pytest.approx(planned.gradients, rel=CLOSE)
    assert _optimizer_bytes(config, dit, owned) == pytest.approx(planned.optimizer, rel=CLOSE)
    if stage == 3:
        weights = sum(_share(each).nbytes for each in dit.parameters())
    else:
        with padded_rows(dit, RANKS):
            weights = sum(each.nbytes for each in dit.parameters())
    assert weights == pytest.approx(planned.weights, rel=CLOSE)


def _share(parameter: Tensor) -> Tensor:
    """Returns a rank's piece of a parameter."""
    return parameter.new_empty(math.ceil(parameter.numel() / RANKS))


def _optimizer_bytes(config: RunConfig, dit: nn.Module, owned: dict[str, Tensor]) -> int:
    """Returns the bytes of masters of some weights, and of what the optimizer holds of them after a step."""
    choice = config.deepspeed.optimizer
    groups = group_parameters(dit, weight_decay=choice.params.weight_decay, rules=())
    masters = {name: nn.Parameter(each.float()) for name, each in owned.items()}
    optimizer = build_optimizer(choice, groups, masters)
    for master in masters.values():
        master.grad = torch.empty_like(master)
    for group in optimizer.param_groups:
        group["fused"] = False  # which the meta device does not have
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return sum(each.nbytes for each in (*masters.values(), *states))
