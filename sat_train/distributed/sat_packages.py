"""Makes the parts of SwissArmyTransformer that this project uses importable without the rest.

`import sat` runs SAT's own training loop module, which imports wandb (undeclared), every model SAT ships,
tokenizers and boto3: seconds per process, and a crash if wandb is missing. Only `sat.mpu`,
`sat.model.base_model`, `sat.model.transformer` and their imports are used here, so the packages above them
are entered into `sys.modules` without running their `__init__`.

Import this module before any `sat.*` import. A complete `sat` that is already loaded is left alone.

Source: THUDM/SwissArmyTransformer@63dc23a `sat/__init__.py`, `sat/model/__init__.py`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

_PACKAGES = ("sat", "sat.model", "sat.training")


def _enter_package(name: str, folder: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    package.__package__ = name
    sys.modules[name] = package


def enter_sat_packages() -> None:
    """Enters `sat`, `sat.model` and `sat.training` into `sys.modules` without running their `__init__`.

    Raises:
        ModuleNotFoundError: SwissArmyTransformer is not installed.
    """
    if "sat" in sys.modules:
        return
    spec = importlib.util.find_spec("sat")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "SwissArmyTransformer is not installed; pip install 'SwissArmyTransformer>=0.4.12'"
        )
    # read once, at import; hides SAT's start-up notes
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in _PACKAGES:
        _enter_package(name, root.joinpath(*name.split(".")[1:]))


enter_sat_packages()
