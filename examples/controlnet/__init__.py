"""ControlNet for CogVideoX: a copy of the first blocks reads the pixels of a control video."""

from sat_train.parts import ConditionName, Field, ModuleParams, part


@part("module", "PixelControlNet", build=".network:PixelControlNet")
class PixelControlNetParams(ModuleParams):
    """Copies of the first blocks; each adds to the output of the block that it was copied from."""

    condition: ConditionName = Field("control", description="Condition that it reads.")
    blocks: int = Field(2, ge=1, description="Blocks copied.")
    width: int = Field(48, ge=2, multiple_of=2, description="Channels of the encoded control.")

    def check(self, model):
        """Yields more blocks than the model has."""
        if self.blocks > model.layers:
            yield "blocks", f"at most {model.layers}, the blocks of the model"
