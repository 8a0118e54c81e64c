"""Rules between settings: what each single value cannot know."""

from sat_train.config.rules import model_rules, path_rules, run_rules
from sat_train.config.rules.rule import ParsedConfig, Rule
from sat_train.config.run import RunConfig
from sat_train.errors import ConfigError, Fault

RULES: tuple[Rule, ...] = (*run_rules.RULES, *model_rules.RULES)
PATH_RULES: tuple[Rule, ...] = path_rules.RULES


def check_rules(config: ParsedConfig, rules: tuple[Rule, ...], faults: list[Fault]) -> None:
    """Adds what the rules find; those that read a key with a fault are left out.

    Args:
        config: Settings that are each right by themselves.
        rules: The rules to check.
        faults: Known faults, to which the new ones are added.
    """
    faulty = {fault.path for fault in faults}
    for rule in rules:
        if rule.can_be_checked(faulty):
            faults.extend(rule.check(config))


def check_on_device(config: RunConfig, device: str) -> None:
    """Checks the rules on the engine again, once the device that `args.device: auto` finds is known.

    Args:
        config: A valid configuration.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: With every combination that DeepSpeed accepts and does wrong.
    """
    faults: list[Fault] = []
    parsed_config = ParsedConfig(
        args=config.args.model_copy(update={"device": device}),
        model=config.model,
        data=config.data,
        deepspeed=config.deepspeed,
        purpose="train",
        source_of=lambda path: config.sources.get(path, ""),
    )
    check_rules(parsed_config, run_rules.ENGINE_RULES, faults)
    if faults:
        raise ConfigError(faults)
