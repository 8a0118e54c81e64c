"""Tora: a video of drawn trajectories steers the norm before attention in every block."""

from sat_train.parts import ConditionName, Field, ModuleParams, part


@part("module", "MotionFuser", build=".network:MotionFuser")
class MotionFuserParams(ModuleParams):
    """Trajectory extractor, and an adaptive norm in each block."""

    condition: ConditionName = Field("motion", description="Condition with the latent of the trajectories.")
    channels: int = Field(128, ge=8, multiple_of=8, description="Width of the motion features.")
