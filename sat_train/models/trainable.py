"""Trainable weights, and their groups for the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sat_train.config.parts.adapter_parts import find_adapter_tensor
from sat_train.errors import ConfigError, Fault

_KEY = "model.not_trainable_prefixes"

# CogVideo's names begin at the whole engine; the text encoder and the VAE are outside the transformer here
_ENGINE_PREFIX = "model.diffusion_model."
_OUTSIDE = ("conditioner", "first_stage_model")


@dataclass(frozen=True)
class TrainableSummary:
    """Numbers of trainable and frozen weights.

    Args:
        trainable: Trainable weights under each prefix, such as `transformer.layers`.
        frozen: Frozen ones.
    """

    trainable: dict[str, int]
    frozen: dict[str, int]

    @property
    def num_trainable(self) -> int:
        """Trainable weights in all."""
        return sum(self.trainable.values())

    def __str__(self) -> str:
        prefixes = sorted(self.trainable.keys() | self.frozen.keys())
        width = max(map(len, prefixes))
        lines = [f"{'':{width}}  {'trainable':>15}  {'frozen':>15}"]
        rows = [(prefix, self.trainable.get(prefix, 0), self.frozen.get(prefix, 0)) for prefix in prefixes]
        rows.append(("all", self.num_trainable, sum(self.frozen.values())))
        lines += [f"{prefix:{width}}  {trainable:>15,}  {frozen:>15,}" for prefix, trainable, frozen in rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay.

    Args:
        name: `decay` or `no_decay`.
        names: Names of the parameters; never empty.
        weight_decay: Decay of this group.
        lr_factor: Factor on the learning rate.
    """

    name: str
    names: tuple[str, ...]
    weight_decay: float
    lr_factor: float = 1.0


def select_trainable(
    dit: nn.Module, *, not_trainable_prefixes: Sequence[str] = (), added: Sequence[str] = ()
) -> TrainableSummary:
    """Freezes weights by prefixes of their names; adapters always train.

    Args:
        dit: The transformer, changed in place.
        not_trainable_prefixes: Prefixes of names, with or without CogVideo's `model.diffusion_model.`; `all`
            matches every name. With adapters and no prefixes everything trains, as in SAT.
        added: Prefixes of the names of added modules, which `all` does not freeze. Weights that a module has
            frozen itself stay frozen.

    Raises:
        ConfigError: A prefix matches nothing, or nothing is left to train.
    """
    prefixes = [
        prefix.removeprefix(_ENGINE_PREFIX)
        for prefix in not_trainable_prefixes
        if not prefix.startswith(_OUTSIDE)
    ]
    _check_prefixes(prefixes, dit)
    for name, parameter in dit.named_parameters():
        matches = any(prefix != "all" and name.startswith(prefix) for prefix in prefixes)
        if name.startswith(tuple(added)):
            parameter.requires_grad_(parameter.requires_grad and not matches)
            continue
        frozen = matches or "all" in prefixes
        parameter.requires_grad_(not frozen or find_adapter_tensor(name) is not None)
    summary = summarize_parameters(dit)
    if summary.num_trainable == 0:
        text = f"at least one trainable weight, under one of {', '.join(sorted(summary.frozen))}"
        raise ConfigError([Fault(_KEY, str(list(not_trainable_prefixes)), text)])
    return summary


def _check_prefixes(prefixes: Sequence[str], dit: nn.Module) -> None:
    names = [name for name, _ in dit.named_parameters()]
    faults = [
        Fault(_KEY, prefix, f"'all', or the beginning of a name such as {names[0]} or {names[-1]}")
        for prefix in prefixes
        if prefix != "all" and not any(name.startswith(prefix) for name in names)
    ]
    if faults:
        raise ConfigError(faults)


def summarize_parameters(dit: nn.Module) -> TrainableSummary:
    """Counts trainable and frozen weights under each prefix; on one rank of several, those of its slice."""
    trainable: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in dit.named_parameters():
        counts = trainable if parameter.requires_grad else frozen
        depth = 2 if name.startswith(("transformer.", "mixins.")) else 1
        prefix = ".".join(name.split(".")[:depth])
        counts[prefix] = counts.get(prefix, 0) + parameter.numel()
    return TrainableSummary(trainable, frozen)


def group_parameters(module: nn.Module, *, weight_decay: float) -> tuple[ParameterGroup, ...]:
    """Groups the trainable parameters: matrices decay, vectors (biases, weights of norms) do not.

    Empty groups are left out: DeepSpeed drops them after a torch schedule has counted them.

    Source: THUDM/SwissArmyTransformer@63dc23a `get_params_for_weight_decay_optimization`.
    """
    trainable = [(name, p.dim() > 1) for name, p in module.named_parameters() if p.requires_grad]
    groups = (
        ParameterGroup(
            name,
            tuple(each for each, is_matrix in trainable if is_matrix == is_decayed),
            weight_decay if is_decayed else 0.0,
        )
        for name, is_decayed in (("decay", True), ("no_decay", False))
    )
    return tuple(group for group in groups if group.names)
