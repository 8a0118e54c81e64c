"""Record of the noise schedule, which the denoiser, the loss and the sampler may all hold."""

from __future__ import annotations

from pydantic import Field

from sat_train.config.parts.record import Record


class ZeroSNRDDPMDiscretizationParams(Record):
    """The noise schedule: linear beta, shifted in signal-to-noise ratio, with no signal at the last step."""

    linear_start: float = Field(0.00085, gt=0, lt=1, description="First beta.")
    linear_end: float = Field(0.0120, gt=0, lt=1, description="Last beta.")
    num_timesteps: int = Field(1000, ge=2, description="Steps of the schedule.")
    shift_scale: float = Field(
        1.0, gt=0, description="The signal-to-noise ratio is divided by this: 3.0 for 2B, else 1.0."
    )
    keep_start: bool = Field(False, description="Keep the first step where it was before the shift.")
    post_shift: bool = Field(False, description="Shift after the last step was set to zero signal.")


class ScheduleGroup(Record):
    """The noise schedule."""

    params: ZeroSNRDDPMDiscretizationParams = Field(
        ZeroSNRDDPMDiscretizationParams(), description="Its settings."
    )
