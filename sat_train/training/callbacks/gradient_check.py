"""Check for weights that do not learn in the first steps of a new run: their gradient is missing or zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sat_train.config.run_warnings import RunWarnings
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.gradient_watch import GradientWatch
from sat_train.training.loop.callback import Callback, Training

_NAME = "weights_get_gradients"
_MOST_SHOWN = 8  # groups of parameters in one message
_UPDATES = (
    2  # after which a module behind a zero layer has a gradient: first the layer moves, then what is behind
)


class GradientCheck(Callback):
    """Checks the gradients of the first steps of a new run; afterwards it costs nothing.

    After the first backward pass each trained parameter must have a gradient. Behind a layer that begins at
    zero it is exactly zero at first, so whether it stays so is asked of new modules only after weights have
    moved, which in a warm-up from zero may be the third step.

    Args:
        mesh: The process mesh.
        new: Prefixes of the modules that the run adds to the base.
        warnings: Where it warns.
    """

    def __init__(self, mesh: ProcessMesh, new: Sequence[str], warnings: RunWarnings) -> None:
        self._mesh, self._new, self._warnings = mesh, tuple(new), warnings
        self._watch: GradientWatch | None = None
        self._missing: set[str] = set()
        self._zero: set[str] = set()
        self._updates = 0

    def started(self, trainer: Training) -> None:
        """Begins to watch, if the run is new."""
        if trainer.state.step == 0 and not trainer.complete:
            self._watch = GradientWatch(trainer.engine.module)

    def before_optimizer_step(self, trainer: Training) -> None:
        """Inspects the gradients of a step."""
        if self._watch is None:
            return
        missing, zero = _on_all_ranks(self._mesh, self._watch)
        if trainer.state.step == 0:
            self._missing = missing
            self._report_missing(missing, trainer)
        elif self._updates:
            new = {name for name in zero if name.startswith(self._new)}
            self._zero = new if self._updates == 1 else self._zero & new
        self._watch.restart()
        if self._updates >= _UPDATES or not self._new:
            self._close()

    def step_done(self, trainer: Training) -> None:
        """Counts the steps that have moved the weights."""
        moved = trainer.applied and trainer.learning_rate.at(trainer.state.step - 1) > 0
        self._updates += moved

    def closed(self) -> None:
        """Ends the watch."""
        if self._watch is not None:
            self._watch.close()

    def _close(self) -> None:
        self.closed()
        self._watch = None
        if self._zero and self._mesh.rank == 0:
            self._warnings.warn(
                _NAME,
                f"the gradient of {len(self._zero)} new parameters is still exactly zero after "
                f"{self._updates} updates: {describe_names(self._zero)}. They do not learn: two layers that "
                "begin at zero stand behind one another, or a mask or a gate is zero for all samples",
            )

    def _report_missing(self, missing: set[str], trainer: Training) -> None:
        if not missing or self._mesh.rank:
            return
        trained = trainer.engine.trained_shapes()
        self._warnings.warn(
            _NAME,
            f"{len(missing)} of {len(trained)} trained parameters have no gradient in the first backward "
            f"pass: {describe_names(missing)}. {likely_reason(missing, trained)}",
        )


def _on_all_ranks(mesh: ProcessMesh, watch: GradientWatch) -> tuple[set[str], set[str]]:
    """Returns the parameters that have no gradient on any rank, and those whose gradient is zero on all.

    Ranks: all.
    """
    shares = gather_objects(mesh, (watch.missing(), watch.zero()))
    missing = set.intersection(*(missing for missing, _ in shares))
    idle = set.intersection(*(missing | zero for missing, zero in shares))
    return missing, idle - missing


def likely_reason(missing: Iterable[str], trained: Iterable[str]) -> str:
    """Returns why parameters may have no gradient.

    Args:
        missing: Names of those without.
        trained: Names of all that train.
    """
    missing, roots = set(missing), {_root(name) for name in missing}
    untouched = sorted(
        root for root in roots if all(name in missing for name in trained if _root(name) == root)
    )
    if untouched:
        return (
            f"Nothing of {', '.join(untouched)} reaches the loss: no hook of it runs, what it returns is not "
            "used, or a `detach` or `no_grad` stands between"
        )
    return (
        "Their modules run only in part: a part is made but not called, its block has no such hook, or its "
        "result is not used"
    )


def describe_names(names: Iterable[str]) -> str:
    """Names parameters in groups: those that differ in the number of their block and in their last part."""
    groups: dict[str, int] = defaultdict(int)
    for name in sorted(names):
        parts = ["*" if part.isdecimal() else part for part in name.split(".")[:-1]]
        groups[".".join(parts) or name] += 1
    shown = [f"{group} ({count})" for group, count in list(groups.items())[:_MOST_SHOWN]]
    return ", ".join(shown) + (f" and {len(groups) - _MOST_SHOWN} more" if len(groups) > _MOST_SHOWN else "")


def _root(name: str) -> str:
    """Returns the module that a parameter belongs to: `mixins.NAME`, or its first part."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "mixins" else parts[0]
