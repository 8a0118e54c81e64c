"""The training engine of the transformer: forward, backward, step, and the trained state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sat_train.checkpoint.fragments import Fragment, SavedFragments, Scalar
from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.processors import threads_of_a_rank
from sat_train.engine.slots import base_optimizer, find_slots, held_piece
from sat_train.engine.step_read import StepRead, read_norm_once
from sat_train.engine.trained_state import compact, read_state, write_state
from sat_train.weights.names import Shape

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of an optimizer step.

    Args:
        applied: The weights were updated: not when a gradient was not finite.
        grad_norm: Norm of the gradient before clipping.
        flags: The flags of the step.
    """

    applied: bool
    grad_norm: float
    flags: tuple[float, ...]


class TrainEngine:
    """A transformer in training. No other package imports DeepSpeed.

    Args:
        engine: `deepspeed.DeepSpeedEngine`.
        mesh: The process mesh.

    Attributes:
        module: The transformer.
        slots: Trained elements that this rank owns, in the order of `masters` and `fragments`.
        zero_stage: 0 to 3.
        micro_steps: Backward passes of an optimizer step.
        before_update: Called before the weights change; waits for whoever still reads them.
    """

    def __init__(self, engine: Any, mesh: ProcessMesh) -> None:
        self._engine = engine
        self._mesh = mesh
        self._optimizer: Any = base_optimizer(engine)
        self.slots = find_slots(engine, mesh)
        self.module: nn.Module = engine.module
        self.zero_stage = int(engine.zero_optimization_stage())
        self.micro_steps = int(engine.gradient_accumulation_steps())
        self.before_update: Callable[[], None] = lambda: None
        self._read = StepRead()
        if self.zero_stage:
            read_norm_once(engine, self._read)
        else:
            engine.optimizer.read = self._read
        if self.zero_stage and hasattr(self._optimizer, "sum_over_ranks"):
            self._optimizer.sum_over_ranks = self._sum_over_ranks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the transformer, through ZeRO's gathering of weights."""
        return self._engine(*args, **kwargs)

    def train(self) -> None:
        """Puts the transformer into training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Puts the transformer into evaluation mode."""
        self._engine.eval()

    def backward(self, loss: Tensor) -> None:
        """Runs one backward pass; the gradients of a step's passes are averaged.

        Ranks: all.
        """
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the pass, updates nothing

    def step(self, learning_rate: float, *, flags: Tensor | None = None) -> StepOutcome:
        """Updates the weights after the last backward pass of a step. Waits for the device once.

        Args:
            learning_rate: Rate of this step.
            flags: [f], float32, on the device, the same on all ranks; they are read together with the norm.
                The weights are not updated where the first is not 0.

        Ranks: all.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        if flags is not None:
            self._read.expect(flags)
        self.before_update()
        with threads_of_a_rank() if self._engine.zero_use_cpu_optimizer() else nullcontext():
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepOutcome(bool(self._engine.was_step_applied()), norm, self._read.take_flags())

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the weights, which would keep all of a run in memory.

        Nothing can be trained with it afterwards.
        """
        self._engine.destroy()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the whole averaged gradient of each parameter that trains, before clipping, fp32.

        Call it between the last backward pass of a step and the step. Only one parameter at a time is in
        memory; with a model axis it is this rank's shard.

        Ranks: all, for all parameters.
        """
        from deepspeed.utils import safe_get_full_grad

        loss_scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and (gradient := safe_get_full_grad(parameter)) is not None:
                yield name, gradient.float() / loss_scale

    def masters(self) -> list[Tensor]:
        """Returns the fp32 weights that this rank owns: [n] each, in the order of `fragments`; views."""
        return [slot.of(slot.flat) for slot in self.slots]

    def trained_shapes(self) -> dict[str, Shape]:
        """Returns names and shapes of the trainable parameters, on this rank of the model axis."""
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained}

    def fragments(self) -> list[Fragment]:
        """Returns the trained state that this rank owns; views, which change in place at the next step.

        Shares of whole parameters, as stage 0 has them, are copies.
        """
        fragments = read_state(self._engine, self.slots)
        is_shared = self.zero_stage == 0 and self._mesh.data_size > 1
        return [compact(fragment) for fragment in fragments] if is_shared else fragments

    def counters(self) -> dict[str, Scalar]:
        """Returns the state of the engine as a whole: a dynamic loss scale, the optimizer's `counters`."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        scale = {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}
        return {**scale, **getattr(self._optimizer, "counters", {})}

    def metrics(self) -> dict[str, float]:
        """Returns the optimizer's own numbers for the log, such as an estimated learning rate."""
        numbers: dict[str, float] = self._optimizer.metrics() if hasattr(self._optimizer, "metrics") else {}
        return numbers

    def load(self, saved: SavedFragments, *, step: int, counters: Mapping[str, Scalar]) -> None:
        """Restores the state of a checkpoint, whatever number of ranks and ZeRO stage wrote it.

        Args:
            saved: The fragments, for this rank of the model axis.
            step: Optimizer steps done.
            counters: From `counters`.

        Raises:
            CheckpointError: Elements are missing.

        Ranks: all.
        """
        write_state(self._engine, self._mesh, saved)
        self._engine.global_steps = step
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name, value in counters.items():
            if name in _LOSS_SCALE and hasattr(scaler, name):
                setattr(scaler, name, type(getattr(scaler, name))(value))
            elif name in getattr(self._optimizer, "counters", {}):
                self._optimizer.counters[name] = value

    def weights(self, *, left_out: Collection[str] = ()) -> dict[str, Tensor] | None:
        """Returns weights in the forward dtype, whole on this rank of the model axis, and buffers.

        Weights are views, which change at the next step. Buffers are copies: a forward pass may change them.

        Args:
            left_out: Names of parameters to leave out, such as `frozen_base`.

        Returns:
            By name; None on all data ranks but the first, and at stage 3.
        """
        if self._mesh.data_rank or self.zero_stage == 3:
            return None
        return {name: tensor.detach() for name, tensor in self._state() if name not in left_out}

    def pieces(self, *, left_out: Collection[str] = ()) -> list[Fragment] | None:
        """Returns what `weights` does, as the pieces that this rank holds at stage 3; None at other stages.

        Args:
            left_out: As for `weights`.
        """
        if self.zero_stage < 3:
            return None
        state = [(name, tensor) for name, tensor in self._state() if name not in left_out]
        pieces = [held_piece(name, tensor, self._mesh) for name, tensor in state]
        return [piece for piece in pieces if piece is not None]

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yields parameters, and copies of the buffers, in the order of the module."""
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            yield name, buffers[name].clone() if name in buffers else tensor

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Sums a tensor over the ranks that own weights, on the device. Ranks: all."""
        return sum_over_data(self._mesh, sums.to(self._mesh.device))
