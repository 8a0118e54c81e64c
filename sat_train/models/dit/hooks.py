"""Assignment of modules to hooks, independent of the order in which they were added to the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sat.mpu import get_model_parallel_world_size
from torch import nn

from sat_train.errors import ConfigError, Fault
from sat_train.models.dit.block import Acting
from sat_train.models.dit.context import ForwardContext
from sat_train.models.dit.mixin import Mixin

# SAT's hooks around the steps of a block
_AROUND_BLOCK = ("layer_forward", "attention_forward", "attention_fn", "mlp_forward")
# SAT's hooks around a step of the model, and the mixin of the base whose step it is
OWNERS = {
    "word_embedding_forward": "patch_embed",
    "position_embedding_forward": "pos_embed",
    "final_forward": "final_layer",
}
# ours, which add or read: their order has no effect
_BETWEEN = ("time_features", "before_blocks", "tap")
_AROUND = (*OWNERS, *_AROUND_BLOCK)
_IN_BLOCK = (*_AROUND_BLOCK, "after_block")

HookOrder = Mapping[str, Sequence[str]]

_MODULES_KEY = "model.modules"
_ORDER_KEY = "model.hook_order"


class Hooks:
    """The modules of a model by the hooks at which they act.

    Args:
        mixins: The model's mixins by name; of these, every `Mixin` may act.
        order: By hook, names of the modules around it, outermost first.
        num_layers: Blocks.

    Attributes:
        between: By hook, the modules that act once a forward: outermost first, or by name.
        in_block: For each block, by hook, the modules that act there with their parts.

    Raises:
        ConfigError: Several modules wrap one step, and `order` does not name the outermost.
    """

    def __init__(self, mixins: Mapping[str, nn.Module], *, order: HookOrder, num_layers: int) -> None:
        self._mixins = [mixin for mixin in mixins.values() if isinstance(mixin, Mixin)]
        self._order = order
        self.between = {hook: self._acting(hook) for hook in (*OWNERS, *_BETWEEN)}
        self.in_block = [self._in_block(index) for index in range(num_layers)]

    def around(self, hook: str, step: Callable[..., Any], forward: ForwardContext) -> Callable[..., Any]:
        """Returns a step of the model inside the modules that wrap it."""
        for mixin in reversed(self.between[hook]):
            step = functools.partial(getattr(mixin, hook), forward=forward, old_impl=step)
        return step

    def origins(self) -> dict[str, str]:
        """Returns the modules at each hook, outermost first; of our own hooks, only those in use."""
        modules = dict(self.between)
        for hook in _IN_BLOCK:
            modules[hook] = tuple(mixin for acting in self.in_block for mixin, _ in acting.get(hook, ()))
        names = {hook: self._sorted(hook, {each.name for each in mixins}) for hook, mixins in modules.items()}
        around = {hook: " -> ".join([*names.pop(hook), OWNERS.get(hook, "block")]) for hook in _AROUND}
        return around | {hook: " + ".join(acting) for hook, acting in names.items() if acting}

    def _in_block(self, index: int) -> dict[str, Acting]:
        acting = {hook: self._acting(hook, index) for hook in _IN_BLOCK}
        return {
            hook: tuple((mixin, mixin.part(index)) for mixin in mixins)
            for hook, mixins in acting.items()
            if mixins
        }

    def _acting(self, hook: str, block: int | None = None) -> tuple[Mixin, ...]:
        mixins = {mixin.name: mixin for mixin in self._mixins if mixin.acts_at(hook, block)}
        names = self._sorted(hook, set(mixins))
        if hook in _AROUND and len(names) > 1 and not set(names) <= set(self._order.get(hook, ())):
            expected = f"{hook}: [{', '.join(names)}], outermost first: all of these act around that step"
            raise ConfigError([Fault(_ORDER_KEY, str(dict(self._order)), expected)])
        return tuple(mixins[name] for name in names)

    def _sorted(self, hook: str, names: set[str]) -> list[str]:
        outermost_first = [name for name in self._order.get(hook, ()) if name in names]
        return outermost_first + sorted(names - set(outermost_first))


def check_mixin(name: str, mixin: nn.Module, *, num_layers: int) -> None:
    """Checks that the model can run a mixin.

    Raises:
        ConfigError: It has hooks and is not a `Mixin`, holds a parameter outside of a module, names a block
            that the model does not have, or does not support tensor parallelism.
    """
    misfits = _misfits(mixin, num_layers) if isinstance(mixin, Mixin) else _foreign_hooks(mixin)
    if hasattr(nn.ModuleDict, name):  # torch would raise a bare KeyError
        misfits = [f"another name than {name}, which torch's modules have a use for", *misfits]
    if misfits:
        path = f"{_MODULES_KEY}.{name}"
        raise ConfigError([Fault(path, type(mixin).__name__, expected) for expected in misfits])


def _foreign_hooks(mixin: nn.Module) -> list[str]:
    hooks = [hook for hook in (*_AROUND, *_BETWEEN, "after_block") if hasattr(mixin, hook)]
    return [f"a class derived from Mixin, since it has {', '.join(hooks)}"] if hooks else []


def _misfits(mixin: Mixin, num_layers: int) -> list[str]:
    faults = [
        f"no parameter directly on the mixin: put {parameter} into a module with a forward"
        for parameter, _ in mixin.named_parameters(recurse=False)
    ]
    blocks = set(mixin.per_block or ()) - {str(index) for index in range(num_layers)}
    faults += [f"per_block of blocks 0 to {num_layers - 1}, not {block}" for block in sorted(blocks)]
    if get_model_parallel_world_size() > 1 and not _is_tensor_parallel(mixin):
        faults.append("model_parallel_size 1: this module does not work under tensor parallelism")
    return faults


def _is_tensor_parallel(mixin: Mixin) -> bool:
    # replicated weights that see only a rank's own heads get a part of their gradient, and diverge silently
    is_partial = mixin.acts_at("attention_fn") and any(True for _ in mixin.parameters())
    return mixin.tensor_parallel == "sharded" or (mixin.tensor_parallel == "replicated" and not is_partial)
