"""Rules between settings: what each single value cannot know."""

from sat_train.config.rules import model, paths, run
from sat_train.config.rules.rule import Draft, Rule
from sat_train.errors import Fault

RULES: tuple[Rule, ...] = (*run.RULES, *model.RULES)
PATH_RULES: tuple[Rule, ...] = paths.RULES


def check_rules(draft: Draft, rules: tuple[Rule, ...], faults: list[Fault]) -> None:
    """Adds what the rules find; those that read a key with a fault are left out.

    Args:
        draft: Settings that are each right by themselves.
        rules: The rules to check.
        faults: Known faults, to which the new ones are added.
    """
    faulty = {fault.path for fault in faults}
    for rule in rules:
        if rule.can_be_checked(faulty):
            faults.extend(rule.check(draft))
