"""An extension with one condition and one module, sound or with one planted fault."""

from __future__ import annotations

from pathlib import Path

_RECORDS = '''
"""Tells the model how bright a clip is, or breaks a law on the way."""

from pydantic import ConfigDict

from sat_train.parts import ConditionParams, Field, ModuleParams, part

FAULT = Field("", description="The law to break.")


@part("condition", "Bright", build=".network:Bright")
class BrightParams(ConditionParams):
    """Brightness of a clip."""

    fault: str = FAULT


@part("module", "Fuser", build=".network:Fuser")
class FuserParams(ModuleParams):
    """A projection of the brightness for each block."""

    fault: str = FAULT


@part("module", "Loose", build=".network:Fuser")
class LooseParams(ModuleParams):
    """Accepts any key."""

    model_config = ConfigDict(extra="ignore")

    fault: str = FAULT
'''

_NETWORK = '''
"""The condition and the module in torch."""

import torch
from torch import nn

from sat_train.extend import Condition, DitInputs, Mixin


class Bright(Condition):
    tensors = frozenset({"mean"})

    def __init__(self, params, model):
        self.params, self.model, self.calls = params, model, 0

    def encode(self, sample, encoders):
        self.calls += 1
        mean = sample.video_tchw.float().mean((0, 2, 3)) / 127.5 - 1
        return {"mean": mean + self.calls * (self.params.fault == "count")}

    def drop(self, encoded, dropped_b):
        mean = encoded["mean"]
        if self.params.fault == "rows":
            return {"mean": mean - mean.mean(0)}
        return {"mean": torch.where(dropped_b[:, None], 0.0, mean)}

    def inputs(self, encoded, random, latent_shape):
        mean = encoded["mean"]
        return DitInputs(extras={self.name: mean[0] if self.params.fault == "batch" else mean})


class Fuser(Mixin):
    table = {}
    tensor_parallel = "sharded"

    def __init__(self, params, model):
        super().__init__(params, model)
        fault = params.fault
        self.embed = nn.Linear(3, 8)
        self.per_block = nn.ModuleDict({str(i): nn.Linear(8, model.width) for i in range(model.layers)})
        for block, layer in self.per_block.items():
            nn.init.zeros_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1) if fault == "base" else nn.init.zeros_(layer.bias)
        self.layers = list(self.per_block.values())
        self.kept = [layer.weight for layer in self.layers]  # empty once ZeRO-3 has divided it
        self.spare = nn.Linear(2, 2) if fault == "unused" else nn.Identity()
        if fault == "zeros":
            nn.init.zeros_(self.embed.weight)
            nn.init.zeros_(self.embed.bias)
        self.calls = self.steps = 0

    def attention_fn(self, query, key, value, *, part, block, context, old_impl):
        result = old_impl(query, key, value, block=block, context=context)
        if self.params.fault != "on_ranks":
            return result
        gate = part(context.extras[self.name])[:, None, None, : result.shape[-1]]
        return result * (1 + gate * result.shape[1])  # of this rank's heads

    def before_blocks(self, hidden_bld, forward):
        state = torch.tanh(self.embed(forward.extras["bright"].expand(len(hidden_bld), -1)))
        if self.params.fault == "on_ranks":
            self.steps += 1
            state = state * self.steps
        if self.params.fault == "order" and list(forward.dit.mixins)[-1] == self.name:
            state = 2 * state
        if self.params.fault == "extras":
            return {self.name: state[:1]}
        if self.params.fault == "shape":
            state = state + self.table.setdefault("size", hidden_bld.shape[1]) / hidden_bld.shape[1] - 1
            self.table["size"] = hidden_bld.shape[1]
        return {self.name: state}

    def after_block(self, x_bld, *, part, block, context):
        layer = self.layers[block.index] if self.params.fault == "index" else part
        if self.params.fault == "state":
            self.calls += 1
        if self.params.fault == "on_ranks":
            state = context.extras[self.name]
            return nn.functional.linear(state, self.kept[block.index])[:, None] + 0 * x_bld
        if self.params.fault == "break":
            print(end="")
        return layer(context.extras[self.name] * (1 + self.calls))[:, None] + 0 * x_bld
'''


def write_faulty(folder: Path) -> Path:
    """Writes the extension and returns its folder."""
    extension = folder / "faulty"
    extension.mkdir()
    (extension / "__init__.py").write_text(_RECORDS.strip() + "\n")
    (extension / "network.py").write_text(_NETWORK.strip() + "\n")
    return extension


def used(*, module: str = "Fuser", fault: str = "", condition_fault: str = "") -> list[str]:
    """Returns the words of a configuration that uses the extension on two blocks."""
    return [
        "model.network_config.params.num_layers=2",
        f"model.conditions.bright={{target: Bright, params: {{fault: {condition_fault or repr('')}}}}}",
        f"model.modules.fuser={{target: {module}, params: {{fault: {fault or repr('')}}}}}",
    ]
