"""Rules on settings of parts that name a field, a condition, a module or a file."""

from __future__ import annotations

from collections.abc import Iterator

from sat_train.config.catalog import suggest_value
from sat_train.config.parts.reference import Reference, references_of
from sat_train.config.parts.registry import choices_in
from sat_train.config.paths import exists
from sat_train.config.rule import ParsedConfig, rule
from sat_train.config.run import SectionRecords
from sat_train.errors import Fault


def references_in(config: SectionRecords) -> Iterator[tuple[str, Reference]]:
    """Yields each reference of each part, with the dotted path of its setting."""
    for path, choice in choices_in({"args": config.args, "model": config.model}):
        for reference in references_of(choice.params):
            yield f"{path}.params.{reference.key}", reference


@rule("args.callbacks", "args.validation_views", "model", "data.fields")
def names_in_parts_exist(config: ParsedConfig) -> Iterator[Fault]:
    """Fields, conditions and modules that a part names and that nothing defines."""
    for path, reference in references_in(config):
        if not reference.group or (reference.group.startswith("data.") and config.data is None):
            continue
        group = config.value(reference.group) or {}
        if reference.name not in group:
            names = ", ".join(group) or f"none: {reference.group} is empty"
            near = suggest_value(reference.name, list(group))
            yield config.fault(path, reference.name, f"a name in {reference.group} ({names})", near)


@rule("args.callbacks", "args.validation_views", "model", "data.fields")
def fields_have_the_kind_that_parts_need(config: ParsedConfig) -> Iterator[Fault]:
    """Fields of another kind than the part that names them can read."""
    fields = config.value("data.fields") or {}
    for path, reference in references_in(config):
        field = fields.get(reference.name) if reference.group == "data.fields" else None
        if field is not None and reference.kinds and field.kind not in reference.kinds:
            expected = (
                f"a field of kind {' or '.join(reference.kinds)}, and data.fields.{reference.name} has "
            )
            yield config.fault(path, reference.name, f"{expected}kind {field.kind}")


@rule("args.callbacks", "args.validation_views", "model", looks_at_paths=True)
def weights_of_parts_exist(config: ParsedConfig) -> Iterator[Fault]:
    """Files of weights that a part names and that do not exist; a full cache needs none."""
    if config.data is not None and config.data.cache == "require" and config.purpose == "train":
        return
    for path, reference in references_in(config):
        if not reference.group and not exists(reference.name):
            yield config.fault(path, reference.name, "a file or folder that exists")
