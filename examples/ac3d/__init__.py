"""AC3D: cameras steer a video through a narrow branch, which acts and trains at high noise only."""

from sat_train.parts import ConditionName, Field, ModuleParams, part


@part("module", "CameraBranch", build=".network:CameraBranch")
class CameraBranchParams(ModuleParams):
    """A few narrow blocks next to the first blocks of the base."""

    condition: ConditionName = Field("camera", description="Condition with the Pluecker maps.")
    channels: int = Field(24, ge=1, description="Channels of these: six for each frame of a group.")
    blocks: int = Field(8, ge=1, description="Blocks.")
    heads: int = Field(4, ge=1, description="Heads, as wide as those of the base.")
    active_from: float = Field(0.6, ge=0, le=1, description="Least noise at which it acts; 1 is pure noise.")

    def check(self, model):
        """Yields more blocks than the model has."""
        if self.blocks > model.layers:
            yield "blocks", f"at most {model.layers}, the blocks of the model"
