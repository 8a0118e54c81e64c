"""A control video that is read with a planted fault, and a module that may not be wired to it."""

from typing import Literal

from sat_train.config.parts.condition_parts import ControlVideoParams
from sat_train.parts import Field, ModuleParams, part


@part("condition", "PlantedControl", build=".parts:PlantedControl")
class PlantedControlParams(ControlVideoParams):
    """A control video, perhaps four frames late, or cropped from another place."""

    fault: Literal["none", "shifted", "cropped"] = Field("none", description="The planted fault.")


@part("module", "AddControl", build=".parts:AddControl")
class AddControlParams(ModuleParams):
    """Adds the patches of a control to the output of the first block."""

    wired: bool = Field(True, description="Off, the control is multiplied by zero.")
