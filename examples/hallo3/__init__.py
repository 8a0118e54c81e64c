"""Hallo3-like: each frame of a video attends to the features of its own sound."""

from sat_train.parts import ConditionName, ConditionParams, Field, FieldName, ModuleParams, part


@part("condition", "AudioFeatures", build=".network:AudioFeatures")
class AudioFeaturesParams(ConditionParams):
    """Features of a speech encoder in each frame of the video, computed beforehand."""

    field: FieldName = Field("sound", description="The features: per_frame, of this width.")
    features: int = Field(768, ge=1, description="Width of the features; what precedes it are tokens.")


@part("module", "FrameCrossAttention", build=".network:FrameCrossAttention")
class FrameCrossAttentionParams(ModuleParams):
    """Cross-attention of each latent frame to its own features, behind blocks."""

    condition: ConditionName = Field("audio", description="Condition that it reads.")
    features: int = Field(768, ge=1, description="Width of the features.")
    every: int = Field(1, ge=1, description="It acts in every so many blocks.")
