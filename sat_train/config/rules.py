"""Rules between settings, which no single value can check by itself."""

from collections.abc import Iterable
from dataclasses import replace

from sat_train.config import condition_rules as condition_rules
from sat_train.config import guard_rails as guard_rails
from sat_train.config import memory_rules as memory_rules
from sat_train.config import model_rules as model_rules
from sat_train.config import path_rules as path_rules
from sat_train.config import reference_rules as reference_rules
from sat_train.config import run_rules
from sat_train.config.facts import RunFacts
from sat_train.config.parts.registry import registered_checks
from sat_train.config.rule import ParsedConfig, Rule
from sat_train.config.run import RunConfig, Sections
from sat_train.errors import ConfigError, Fault


def all_rules(*, looking_at_paths: bool = False) -> list[Rule]:
    """Returns the rules of the package and of extensions: those that check paths, or those that do not."""
    return [rule for rule in registered_checks() if rule.looks_at_paths == looking_at_paths]


def check_rules(config: ParsedConfig, rules: Iterable[Rule], faults: list[Fault]) -> None:
    """Checks rules and adds their faults; rules that read a key with a fault are left out.

    Args:
        config: Settings that are each valid by themselves.
        rules: The rules to check.
        faults: Known faults, to which the new ones are added.
    """
    faulty = {fault.path for fault in faults}
    for rule in rules:
        if rule.severity == "error" and rule.can_be_checked(faulty):
            reference = f" ({rule.source})" if rule.source else ""
            found = rule.check(config)
            faults.extend(replace(fault, expected=f"{fault.expected}{reference}") for fault in found)


def warnings_of(config: ParsedConfig, rules: Iterable[Rule] | None = None) -> list[str]:
    """Returns the warnings of the rules that only warn, unless `args.silence` names them.

    Args:
        config: Settings without faults.
        rules: The rules to check; None: all.
    """
    return [
        f"{fault} ({'; '.join(filter(None, [rule.source, f'args.silence=[{rule.name}] hides this']))})"
        for rule in (all_rules() if rules is None else rules)
        if rule.severity == "warning" and rule.name not in config.args.silence
        for fault in rule.check(config)
    ]


def warnings_of_run(config: RunConfig, facts: RunFacts) -> list[str]:
    """Returns the warnings of the guard rails that can only judge when data and machine are known."""
    parsed_config = replace(_parsed(config), facts=facts)
    return warnings_of(parsed_config, [rule for rule in all_rules() if rule.reads_facts])


def check_on_device(config: RunConfig, device: str) -> None:
    """Checks the rules on the engine again, once the device behind `args.device: auto` is known.

    Args:
        config: A valid configuration.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: Names every combination that DeepSpeed accepts and computes wrongly.
    """
    faults: list[Fault] = []
    args = config.args.model_copy(update={"device": device})
    check_rules(replace(_parsed(config), args=args), run_rules.ENGINE_RULES, faults)
    if faults:
        raise ConfigError(faults)


def _parsed(config: RunConfig) -> ParsedConfig:
    """Returns the settings of a run that trains, as rules take them."""
    sections = {name: getattr(config, name) for name in Sections.model_fields}
    return ParsedConfig(**sections, purpose="train", source_of=lambda path: config.sources.get(path, ""))
