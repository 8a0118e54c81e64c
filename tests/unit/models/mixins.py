"""Network modules as extensions write them, for the tests of this folder and of the ranks."""

from __future__ import annotations

import torch
from torch import nn

from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.networks import SMALL
from tests.unit.models.narrow import inputs, randomized

LAYERS = 4
WIDTH = SMALL["width"]


def parts(*blocks: int, zero: bool = False) -> nn.ModuleDict:
    """Returns a linear layer for each block, seeded by the block."""
    layers = nn.ModuleDict({str(block): nn.Linear(WIDTH, WIDTH) for block in blocks})
    for block, layer in layers.items():
        generator = torch.Generator().manual_seed(int(block))
        for parameter in layer.parameters():
            nn.init.zeros_(parameter) if zero else nn.init.normal_(parameter, std=0.1, generator=generator)
    return layers


class Branch(Mixin):
    """As a control branch: makes something of the embedded tokens, and adds it behind some blocks."""

    def __init__(self, *blocks: int, zero: bool = False) -> None:
        super().__init__()
        self.embed = parts(7)["7"]
        self.per_block = parts(*blocks, zero=zero)

    def before_blocks(self, hidden_bld, forward):
        states = {int(block): self.embed(hidden_bld) * (1 + int(block)) for block in self.per_block}
        return {self.name: states, f"{self.name}_gate": torch.ones(len(hidden_bld), 1, 1)}

    def after_block(self, x_bld, *, part, block, context):
        delta_bthwd = part(context.video(context.extras[self.name]))
        return context.extras[f"{self.name}_gate"] * context.tokens(delta_bthwd)


class Fuser(Mixin):
    """As a motion fuser: changes what attention reads."""

    def __init__(self, *blocks: int, zero: bool = False) -> None:
        super().__init__()
        self.per_block = parts(*blocks, zero=zero)

    def attention_forward(self, x_bld, *, part, block, context, old_impl):
        return old_impl(x_bld + context.tokens(part(context.video(x_bld))), block=block, context=context)


class Remembering(Mixin):
    """As a reference network: attention sees more tokens than the block has."""

    def __init__(self, *blocks: int) -> None:
        super().__init__()
        self.per_block = parts(*blocks)

    def attention_forward(self, x_bld, *, part, block, context, old_impl):
        longer = torch.cat([x_bld, part(x_bld[:, :3])], dim=1)
        return old_impl(longer, block=block, context=context.with_tokens(3))[:, : x_bld.shape[1]]


class Head(Mixin):
    """As an auxiliary loss: keeps what the blocks give."""

    def __init__(self) -> None:
        super().__init__()
        self.project = parts(9)["9"]

    def tap(self, hidden_bld, block, forward):
        name = f"{self.name}_{block.index}"
        assert name not in forward.outputs, "once"
        forward.outputs[name] = self.project(forward.block.video(hidden_bld))


class Doubling(Mixin):
    def mlp_forward(self, x_bld, *, part, block, context, old_impl):
        return 2 * old_impl(x_bld, block=block, context=context)


def one_in(block: int) -> Mixin:
    """Returns a module around the MLP of one block."""
    mixin = Doubling()
    mixin.per_block = parts(block)
    return mixin


def context_of(dit: DiffusionTransformer) -> BlockContext:
    """Returns what the blocks of the narrow transformer read."""
    latent, timesteps, text = inputs()
    return dit.block_context(dit.time_features(timesteps), latent, text)


class PlusOne(Mixin):
    def mlp_forward(self, x_bld, *, part, block, context, old_impl):
        return 1 + old_impl(x_bld, block=block, context=context)


def several() -> dict[str, Mixin]:
    """Returns modules of each kind, which act in different blocks."""
    return {
        "control": Branch(0, 2),
        "audio": Branch(1, 2),
        "motion": Fuser(0, 3),
        "reference": Remembering(1),
    }


def with_modules(modules: dict[str, Mixin], **options: object) -> DiffusionTransformer:
    dit = randomized(layers=LAYERS, **options)
    for name, mixin in modules.items():
        dit.add_mixin(name, mixin)
    return dit
