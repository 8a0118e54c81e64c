"""VideoREPA: relations between the tokens of a block follow those of a frozen video encoder."""

from sat_train.parts import (
    ConditionName,
    ConditionParams,
    Field,
    LossTermParams,
    ModuleName,
    ModuleParams,
    WeightsFile,
    part,
)


@part("condition", "VideoFeatures", build=".network:VideoFeatures")
class VideoFeaturesParams(ConditionParams):
    """Tokens of a frozen video encoder on the clip's own pixels; cached, so training need not run it."""

    weights: WeightsFile = Field(description="Weights of the encoder, which make_encoder.py writes.")
    size: tuple[int, int] = Field((32, 48), description="Height and width that it sees.")


@part("module", "RelationHead", build=".network:RelationHead")
class RelationHeadParams(ModuleParams):
    """Projects the hidden states of a block to the width of the encoder's tokens."""

    block: int = Field(18, ge=0, description="Block whose output is used.")
    width: int = Field(768, ge=1, description="Width of the encoder's tokens.")

    def check(self, model):
        """Yields a block that the model does not have."""
        if self.block >= model.layers:
            yield "block", f"below {model.layers}, the blocks of the model"


@part("loss_term", "TokenRelations", build=".network:TokenRelations")
class TokenRelationsParams(LossTermParams):
    """Mean absolute difference between the cosine similarities of tokens, above a margin."""

    condition: ConditionName = Field("features", description="Condition with the encoder's tokens.")
    module: ModuleName = Field("relation", description="Module that projects the hidden states.")
    margin: float = Field(0.1, ge=0, description="Differences below it cost nothing.")
