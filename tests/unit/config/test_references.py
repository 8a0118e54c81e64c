"""Settings of parts that name conditions, modules, fields and files: what names nothing is refused."""

from __future__ import annotations

import pytest

from sat_train.config import load_run_config
from sat_train.errors import ConfigError

EXTENSION = '''
"""Parts that name others."""

from typing import Annotated

from sat_train.parts import (
    ConditionName, ConditionParams, Field, FieldName, Kinds, ModuleName, ModuleParams, WeightsFile, part
)


@part("condition", "Named", build=":build")
class NamedParams(ConditionParams):
    """Names fields and a file."""

    field: Annotated[FieldName, Kinds("video")] | None = Field(None, description="A video.")
    others: tuple[FieldName, ...] = Field((), description="More of them.")
    weights: WeightsFile | None = Field(None, description="An encoder.")


@part("module", "Naming", build=":build")
class NamingParams(ModuleParams):
    """Names a condition and a module."""

    condition: ConditionName = Field("control", description="A condition.")
    module: ModuleName | None = Field(None, description="A module.")


def build(params, model):
    raise AssertionError
'''


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    path = tmp_path_factory.mktemp("extension") / "naming.py"
    path.write_text(EXTENSION)
    return str(path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["model.conditions.contrl.target=Named", "model.modules.branch.target=Naming"],
            r"model\.modules\.branch\.params\.condition = control: expected a name in model\.conditions "
            r"\(contrl\); did you mean 'contrl'",
        ),
        (
            ["model.conditions.a.target=Named", "model.conditions.a.params.field=flow"],
            r"conditions\.a\.params\.field = flow: expected a name in data\.fields \(none: data",
        ),
        (
            ["model.modules.a.target=Naming", "model.modules.a.params.module=b"],
            r"modules\.a\.params\.module = b: expected a name in model\.modules \(a\)",
        ),
        (
            ["model.conditions.a.target=Named", "model.conditions.a.params.weights=no/such.pt"],
            r"conditions\.a\.params\.weights = no/such\.pt: expected a file or folder that exists",
        ),
    ],
)
def test_a_name_of_nothing_is_refused(extension, words, says):
    with pytest.raises(ConfigError, match=says):
        load_run_config(["configs/sft.yaml"], ["--extension", extension, *words])
