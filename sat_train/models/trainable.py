"""Trainable weights, and their groups for the optimizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from sat_train.config.parts.adapter_parts import AdapterConfig, find_adapter_tensor
from sat_train.config.schema.model_section import ModelConfig, TrainConfig
from sat_train.errors import ConfigError, Fault
from sat_train.models.dit.transformer import DiffusionTransformer

_KEY = "model.not_trainable_prefixes"

# CogVideo's names begin at the whole engine; the text encoder and the VAE are outside the transformer here
_ENGINE_PREFIX = "model.diffusion_model."
_BASE_IS_FROZEN = (
    "The base is frozen, because there are modules: model.train={all: {match: [.]}} trains it too, "
    "and other patterns train a part of it."
)
_OUTSIDE = ("conditioner", "first_stage_model")


@dataclass(frozen=True)
class TrainableSummary:
    """Numbers of trainable and frozen weights.

    Args:
        trainable: Trainable weights under each prefix, such as `transformer.layers`.
        frozen: Frozen ones.
        note: A sentence on what decided it.
    """

    trainable: dict[str, int]
    frozen: dict[str, int]
    note: str = ""

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
        return "\n".join([*lines, self.note] if self.note else lines)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a learning rate.

    Args:
        name: `decay` or `no_decay`, behind the name of a rule that matches them.
        names: Names of the parameters; never empty.
        weight_decay: Decay of this group.
        lr_factor: Factor on the learning rate.
    """

    name: str
    names: tuple[str, ...]
    weight_decay: float
    lr_factor: float = 1.0


@dataclass(frozen=True)
class TrainRule:
    """Patterns of weights with a factor on their learning rate.

    Args:
        key: Key of the configuration, such as `model.train.patches`.
        match: Regular expressions searched in the names.
        lr_factor: Factor on the learning rate.
    """

    key: str
    match: tuple[str, ...]
    lr_factor: float

    def matches(self, name: str) -> bool:
        """Returns whether one of the patterns finds the name."""
        return any(re.search(pattern, name) for pattern in self.match)


def train_rules(train: Mapping[str, TrainConfig]) -> tuple[TrainRule, ...]:
    """Returns the rules of `model.train`."""
    return tuple(TrainRule(f"model.train.{name}", each.match, each.lr) for name, each in train.items())


def adapter_rules(adapter: AdapterConfig | None) -> tuple[TrainRule, ...]:
    """Returns the rules of an adapter's own factors, such as that of LoRA+."""
    factors = adapter.params.lr_factors if adapter is not None else {}
    return tuple(
        TrainRule("lora_config", (rf"\.{re.escape(name)}(?:\.\d+)?$",), factor)
        for name, factor in factors.items()
        if factor != 1
    )


def select_configured(dit: DiffusionTransformer, model: ModelConfig) -> TrainableSummary:
    """Freezes the weights that section `model` does not train; see `select_trainable`.

    Where there are network modules, and neither adapters nor a setting that says what trains, the base is
    frozen: a module is what such a run is for.

    Raises:
        ConfigError: A prefix or pattern matches nothing, or nothing is left to train.
    """
    is_default = model.freezes_base and not model.not_trainable_prefixes
    summary = select_trainable(
        dit,
        not_trainable_prefixes=("all",) if is_default else model.not_trainable_prefixes,
        freeze=model.freeze,
        train=train_rules(model.train),
        added=dit.added_prefixes(),
    )
    return replace(summary, note=_BASE_IS_FROZEN) if is_default else summary


def select_trainable(
    dit: nn.Module,
    *,
    not_trainable_prefixes: Sequence[str] = (),
    freeze: Sequence[str] = (),
    train: Sequence[TrainRule] = (),
    added: Sequence[str] = (),
) -> TrainableSummary:
    """Freezes weights by prefixes of their names and by patterns; adapters train unless a pattern names them.

    Args:
        dit: The transformer, changed in place.
        not_trainable_prefixes: Prefixes of names, with or without CogVideo's `model.diffusion_model.`; `all`
            matches every name. With adapters and no prefixes everything trains, as in SAT.
        freeze: Regular expressions of the names of further frozen weights.
        train: Rules of weights that train whatever freezes them. Where there are adapters, of these and of
            added modules only: a LoRA is saved and exported without its base.
        added: Prefixes of the names of added modules, which `all` does not freeze. Weights that a module has
            frozen itself stay frozen.

    Raises:
        ConfigError: A prefix or pattern matches nothing, or nothing is left to train.
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
    _check_patterns(freeze, train, dit, tuple(added))
    for name, parameter in dit.named_parameters():
        if any(rule.matches(name) for rule in train):
            parameter.requires_grad_(True)
        elif any(re.search(pattern, name) for pattern in freeze):
            parameter.requires_grad_(False)
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


def _check_patterns(
    freeze: Sequence[str], train: Sequence[TrainRule], dit: nn.Module, added: tuple[str, ...]
) -> None:
    names = [name for name, _ in dit.named_parameters()]
    own = [name for name in names if find_adapter_tensor(name) or (added and name.startswith(added))]
    has_adapters = any(find_adapter_tensor(name) for name in names)
    keyed = [("model.freeze", pattern, names) for pattern in freeze]
    keyed += [
        (f"{rule.key}.match", pattern, own if has_adapters else names)
        for rule in train
        for pattern in rule.match
    ]
    faults = [fault for key, pattern, allowed in keyed for fault in _faults(key, pattern, names, allowed)]
    if faults:
        raise ConfigError(faults)


def _faults(key: str, pattern: str, names: Sequence[str], allowed: Sequence[str]) -> Iterator[Fault]:
    found = {name for name in names if re.search(pattern, name)}
    if not found:
        near = difflib.get_close_matches(pattern.replace("\\", ""), names, n=2, cutoff=0.0)
        yield Fault(key, pattern, f"a pattern that finds a weight, such as {' or '.join(near)}")
    elif found - set(allowed):
        text = f"adapters and added modules only, not {min(found - set(allowed))}: a LoRA is saved without it"
        yield Fault(key, pattern, text)


def frozen_base(dit: DiffusionTransformer) -> dict[str, tuple[int, ...]]:
    """Returns the base's frozen weights with their shapes: neither adapters' nor those of added modules.

    On one rank of several, the shapes are those of its slice; ZeRO may have divided the weights.
    """
    added = tuple(dit.modules_of_its_own())
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in dit.named_parameters()
        if not parameter.requires_grad and not name.startswith(added) and find_adapter_tensor(name) is None
    }


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


def group_parameters(
    module: nn.Module, *, weight_decay: float, rules: Sequence[TrainRule] = ()
) -> tuple[ParameterGroup, ...]:
    """Groups the trainable parameters: matrices decay, vectors (biases, weights of norms) do not.

    Args:
        module: The transformer.
        weight_decay: Decay of the matrices.
        rules: Factors on the learning rate.

    Returns:
        The groups. Empty ones are left out: DeepSpeed drops them after a torch schedule has counted them.

    Raises:
        ConfigError: Two rules give one weight different factors.

    Source: THUDM/SwissArmyTransformer@63dc23a `get_params_for_weight_decay_optimization`.
    """
    groups: dict[tuple[str, float, bool], list[str]] = {}
    for is_decayed in (True, False):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (parameter.dim() > 1) == is_decayed:
                groups.setdefault((*_rule_of(name, rules), is_decayed), []).append(name)
    return tuple(
        ParameterGroup(
            f"{label}decay" if is_decayed else f"{label}no_decay",
            tuple(names),
            weight_decay if is_decayed else 0.0,
            factor,
        )
        for (label, factor, is_decayed), names in groups.items()
    )


def _rule_of(name: str, rules: Sequence[TrainRule]) -> tuple[str, float]:
    """Returns the name of the rule that matches a weight, and its factor."""
    matching = [rule for rule in rules if rule.matches(name)]
    if len({rule.lr_factor for rule in matching}) > 1:
        first, other = matching[0], next(r for r in matching if r.lr_factor != matching[0].lr_factor)
        text = f"one factor for {name}, which {other.key} gives {other.lr_factor:g}"
        raise ConfigError([Fault(first.key, f"{first.lr_factor:g}", text)])
    return (f"{matching[0].key.rpartition('.')[2]} ", matching[0].lr_factor) if matching else ("", 1.0)


def group_table(groups: Sequence[ParameterGroup], module: nn.Module, *, lr: float) -> str:
    """Returns the groups in lines: weights, learning rate and decay of each."""
    counts = {name: parameter.numel() for name, parameter in module.named_parameters()}
    width = max(len(group.name) for group in groups)
    lines = [f"{'':{width}}  {'weights':>15}  {'lr':>9}  {'decay':>9}"]
    lines += [
        f"{group.name:{width}}  {sum(counts[name] for name in group.names):>15,}  "
        f"{lr * group.lr_factor:>9.3g}  {group.weight_decay:>9.3g}"
        for group in groups
    ]
    return "\n".join(lines)
