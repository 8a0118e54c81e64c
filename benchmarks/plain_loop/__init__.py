"""A plain torch loop and SAT's trainer, which take turns with the training loop, for `benchmarks/step.py`."""

from sat_train.parts import CallbackParams, Field, part


@part("callback", "PlainLoop", build=".callback:PlainLoop")
class PlainLoopParams(CallbackParams):
    """Times rounds of training, and after each as many steps of a plain loop and of SAT's trainer."""

    writes_files = True

    steps: int = Field(100, ge=1, description="Steps of a round.")
    fused: bool = Field(False, description="AdamW of the plain loop: torch's fused one, or its default.")
    sat: bool = Field(False, description="Whether SAT's trainer takes a turn, too.")
