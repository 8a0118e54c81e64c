"""The trained state of a DeepSpeed engine as fragments, without DeepSpeed's checkpoint code.

The state of a parameter is a number for each element (masters, moments), a number for the whole (Adam's
`step`), or tensors of any other shape (a factored second moment, quantised moments), which no other partition
of the parameter can use: they are saved and loaded with the parameter as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sat_train.checkpoint.fragments import AVERAGE, MASTER, Fragment, SavedFragments, Scalar
from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.slots import Slot, base_optimizer, held_slots, refresh_weights
from sat_train.errors import CheckpointError, TrainingError


def read_state(engine: Any, slots: Sequence[Slot]) -> list[Fragment]:
    """Returns this rank's share of the masters and of the optimizer's state; views, nothing is copied.

    They change in place at the next step.
    """
    states = base_optimizer(engine).state
    return [_fragment(slot, states.get(slot.flat, {})) for slot in slots]


def compact(fragment: Fragment) -> Fragment:
    """Returns a fragment that owns its elements: a file would hold the whole tensor behind a view."""
    return replace(fragment, tensors={kind: run.clone() for kind, run in fragment.tensors.items()})


def _fragment(slot: Slot, state: dict[str, Any]) -> Fragment:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    runs = {name: value for name, value in tensors.items() if _is_per_element(value, slot.flat)}
    indivisible = {name: value for name, value in tensors.items() if name not in runs}
    if indivisible and slot.flat.shape != slot.shape:
        raise TrainingError(
            f"the optimizer keeps {', '.join(indivisible)} for a vector of pieces of weights",
            remedy="its record must say `elementwise = False`, so that it is refused at ZeRO stage 3",
        )
    return Fragment(
        slot.name,
        slot.shape,
        slot.offset,
        {name: slot.of(tensor) for name, tensor in {MASTER: slot.flat, **runs}.items()},
        {name: _number(name, value) for name, value in state.items() if name not in tensors},
        indivisible if slot.offset == 0 else {},
    )


def _is_per_element(value: Tensor, flat: Tensor) -> bool:
    return value.shape == flat.shape and value.is_floating_point()


def _number(name: str, value: object) -> Scalar:
    number = value.item() if isinstance(value, Tensor) else value
    assert isinstance(number, (int, float)), f"the optimizer's {name} is a {type(number).__name__}"
    return number


@torch.no_grad()
def write_state(engine: Any, mesh: ProcessMesh, saved: SavedFragments) -> None:
    """Writes a saved state into an engine, whatever its ZeRO stage and number of ranks.

    Args:
        engine: `deepspeed.DeepSpeedEngine`; names and shapes have been compared with the saved ones.
        mesh: The process mesh.
        saved: The state, for this rank of the model axis.

    Ranks: all.
    """
    optimizer = base_optimizer(engine)
    for flat, slots in _by_flat(held_slots(engine, mesh)):
        state = _new_state(optimizer, flat, slots, saved)
        optimizer.state[flat] = state
        flat.zero_()  # padding is uninitialized memory
        for slot in slots:
            for kind in _kept_by_engine(saved, slot):
                run = saved.read(slot.name, kind, offset=slot.offset, count=slot.count)
                slot.of(flat if kind == MASTER else state[kind]).copy_(run)
    refresh_weights(engine)


def _by_flat(slots: Iterable[Slot]) -> Iterator[tuple[Tensor, list[Slot]]]:
    together: dict[int, list[Slot]] = {}
    for slot in slots:
        together.setdefault(id(slot.flat), []).append(slot)
    for group in together.values():
        yield group[0].flat, group


def _kept_by_engine(saved: SavedFragments, slot: Slot) -> list[str]:
    return [kind for kind in saved.kinds(slot.name) if kind != AVERAGE]


def _new_state(
    optimizer: torch.optim.Optimizer, flat: Tensor, slots: list[Slot], saved: SavedFragments
) -> dict[str, Any]:
    """Returns zeros for each saved state, separate counters for the flat tensor, and what is indivisible."""
    kinds = {kind for slot in slots for kind in _kept_by_engine(saved, slot)} - {MASTER}
    settings = _group_of(optimizer, flat)
    on_device = settings.get("fused") or settings.get("capturable")
    device = flat.device if on_device else torch.device("cpu")
    # of a parameter that has been stepped: at stage 0 one that never had a gradient keeps no state
    numbers = next((scalars for slot in slots if (scalars := saved.scalars(slot.name))), {})
    # counted in place, so that two flat tensors must not share one; torch keeps counters as float tensors
    counters: dict[str, Any] = {
        name: torch.tensor(value, device=device) if type(value) is float else value
        for name, value in numbers.items()
    }
    zeros = {kind: torch.zeros_like(flat) for kind in kinds}
    return {**counters, **zeros, **_indivisible(flat, slots, saved)}


def _group_of(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any]:
    """Returns the settings of a tensor: optimizers made of several have groups of several kinds."""
    groups = optimizer.param_groups
    own = (group for group in groups if any(each is flat for each in group["params"]))
    return next(own, groups[0])  # stage 3 fills its groups, of one kind, in each step


def _indivisible(flat: Tensor, slots: list[Slot], saved: SavedFragments) -> dict[str, Tensor]:
    """Returns copies of the state that belongs to a parameter as a whole.

    Raises:
        CheckpointError: There is some, and `flat` is not one whole parameter.
    """
    state = {kind: tensor for slot in slots for kind, tensor in saved.indivisible(slot.name).items()}
    if state and flat.shape != slots[0].shape:
        raise CheckpointError(
            f"{saved.where} holds {', '.join(state)} of {slots[0].name}, which cannot be divided",
            expected="ZeRO stage 0, 1 or 2",
        )
    return {kind: tensor.to(flat.device, copy=True) for kind, tensor in state.items()}
