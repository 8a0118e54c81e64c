"""New weights that cannot learn are named in the first steps, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.distributed.processes import stop_processes
from tests.ranks.micro import logged_micro, write_micro

pytestmark = pytest.mark.ranks

_RECORD = '''
"""A module of which parts cannot learn."""

from sat_train.parts import ModuleParams, part


@part("module", "Hollow", build=".network:Hollow")
class HollowParams(ModuleParams):
    """Adds nothing to the time features."""
'''
_NETWORK = """
import torch
from torch import nn

from sat_train.extend import Mixin


class Hollow(Mixin):
    def __init__(self, params, model):
        super().__init__(params, model)
        self.behind = nn.Linear(1, 4)
        self.gate = nn.Linear(4, model.time_width, bias=False)
        self.spare = nn.Linear(4, 4)
        self.first = nn.Linear(1, 4, bias=False)
        self.second = nn.Linear(4, model.time_width, bias=False)
        for layer in (self.gate, self.first, self.second):
            nn.init.zeros_(layer.weight)

    def time_features(self, forward):
        one_b1 = forward.timesteps_b[:, None].to(forward.latent_btchw.dtype) / 1000
        return self.gate(self.behind(one_b1)) + self.second(self.first(one_b1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gradients")
    write_micro(path)
    (path / "hollow").mkdir()
    (path / "hollow/__init__.py").write_text(_RECORD)
    (path / "hollow/network.py").write_text(_NETWORK)
    stop_processes()
    return path


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_parts_without_a_gradient_and_those_that_stay_zero_are_named(rank_pool, folder, stage, ranks):
    words = ["--extension", str(folder / "hollow"), "model.modules.hollow.target=Hollow"]
    words += ["args.train_iters=4", f"args.zero_stage={stage}", f"args.experiment_name=stage{stage}"]
    lines = rank_pool(ranks)(logged_micro, folder, [*words, "args.warmup=2"])[0]
    (missing,) = [line for line in lines if "no gradient in the first backward pass" in line]
    assert "2 of " in missing
    assert "mixins.hollow.spare (2)" in missing
    assert "run only in part" in missing
    (zero,) = [line for line in lines if "is still exactly zero" in line]
    assert "2 new parameters" in zero, "a warm-up from a rate of zero moves nothing in its first step"
    assert "mixins.hollow.first (1), mixins.hollow.second (1)" in zero
    if stage == 1:
        resumed = [*words, "args.train_iters=5", "args.resume=must", "args.save_interval=4"]
        lines = rank_pool(ranks)(logged_micro, folder, resumed)[0]
        assert not any("parameters" in line for line in lines), "only a new run is checked"
