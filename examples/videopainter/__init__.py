"""VideoPainter: a light branch on the masked video guides every block, where nothing is to be painted."""

from sat_train.parts import ConditionName, Field, ModuleParams, part


@part("module", "ContextBranch", build=".network:ContextBranch")
class ContextBranchParams(ModuleParams):
    """Copies of a few first blocks; each serves a group of the base's blocks."""

    condition: ConditionName = Field("context", description="Inpainting condition that it reads.")
    blocks: int = Field(2, ge=1, description="Blocks copied.")

    def check(self, model):
        """Yields more blocks than the model has."""
        if self.blocks > model.layers:
            yield "blocks", f"at most {model.layers}, the blocks of the model"
