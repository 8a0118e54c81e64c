"""Rules on the conditions of a model, and on what guidance leaves out."""

from __future__ import annotations

from collections.abc import Iterator

from sat_train.config.catalog import suggest_value
from sat_train.config.reference_rules import references_in
from sat_train.config.rule import ParsedConfig, rule
from sat_train.errors import Fault


@rule("model.conditions", "model.noised_image_dropout")
def one_condition_takes_the_image_slot(config: ParsedConfig) -> Iterator[Fault]:
    """Two conditions in the image latent, or a drop-out of the built-in one that is not there."""
    conditions = config.model.conditions
    takers = [name for name, choice in conditions.items() if choice.params.takes_image_slot]
    for name in takers[1:]:
        expected = f"one condition in the image latent, and model.conditions.{takers[0]} is there"
        yield config.fault(f"model.conditions.{name}", conditions[name].target, expected)
    if takers and config.model.noised_image_dropout:
        expected = f"0: model.conditions.{takers[0]} takes its place, and has its own `drop`"
        yield config.fault("model.noised_image_dropout", config.model.noised_image_dropout, expected)


@rule("model", "args.callbacks", severity="warning")
def conditions_are_read(config: ParsedConfig) -> Iterator[Fault]:
    """Conditions that no module and no loss term names, and that do nothing by themselves."""
    named = {each.name for _, each in references_in(config) if each.group == "model.conditions"}
    for name, choice in config.model.conditions.items():
        if choice.params.needs_reader() and name not in named:
            remedy = "a loss term" if choice.params.training_only else "a module, or `params.into: channels`"
            expected = f"a condition that something reads: add {remedy} with `condition: {name}`"
            yield config.fault(f"model.conditions.{name}", choice.target, expected)


@rule("model", "args.callbacks")
def modules_read_extras(config: ParsedConfig) -> Iterator[Fault]:
    """Modules that name a condition whose tensor stands on channels, where no module finds it."""
    for path, reference in references_in(config):
        condition = config.model.conditions.get(reference.name)
        is_named = reference.group == "model.conditions" and path.startswith("model.modules.")
        if is_named and condition is not None and getattr(condition.params, "into", "") == "channels":
            key = f"model.conditions.{reference.name}.params.into"
            yield config.fault(key, "channels", f"extras: {path} reads it")


@rule("args.guidance_drops", "model.conditions", "model.noised_image_input")
def guidance_drops_conditions_that_exist(config: ParsedConfig) -> Iterator[Fault]:
    names = [*config.spec.conditions]
    for index, name in enumerate(config.args.guidance_drops or ()):
        if name not in names:
            expected = f"a condition of this model: {', '.join(names)}"
            yield config.fault(f"args.guidance_drops.{index}", name, expected, suggest_value(name, names))
