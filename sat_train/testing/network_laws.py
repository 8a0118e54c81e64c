"""Laws that one forward and backward in this process can try."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sat_train.config import load_run_config
from sat_train.encoding.conditions.condition import DitInputs
from sat_train.errors import ConfigError
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import ForwardContext
from sat_train.models.dit.frame_levels import frame_timesteps
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.stack import BlockStack
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.objective.training_inputs import TrainingInputs
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.testing.trial import (
    OTHER_SHAPE,
    PRESET,
    ROWS,
    ExtensionTrial,
    LawBroken,
    NotApplicable,
    Results,
    added_weights,
    differing,
    evaluate,
    fixed_inputs,
    open_gates,
    with_encodings,
)

_WIDENED = 1e-6  # fp32: a wider projection adds its products in another order
_COMPILED = 1e-5  # a compiled graph may add gradients in another order


def typos_are_refused(trial: ExtensionTrial) -> str:
    """A key that a part does not have is refused by name."""
    if not trial.parts:
        raise NotApplicable("the configuration uses no part of the extension")
    for part in trial.parts:
        for field in part.record.model_fields or ["setting"]:
            typo = f"{part.settings}.{field}x"
            try:
                load_run_config([PRESET, *trial.files], trial.command(f"{typo}=1"), check_paths=False)
            except ConfigError as error:
                if any(fault.path == typo for fault in error.faults):
                    continue
                raise LawBroken(f"{typo} is refused without its name: {error}") from error
            raise LawBroken(
                f"{typo}=1 is accepted: {part.record.__name__} must refuse unknown keys (extra='forbid', as "
                "its base does)"
            )
    return f"{len(trial.parts)} parts"


def it_begins_as_the_base(trial: ExtensionTrial) -> str:
    """At initialisation, or with its conditions dropped, the model predicts what the base predicts."""
    ours, base = trial.pipeline(), trial.base_pipeline()
    state = base.dit.state_dict()
    ours.dit.eval(), base.dit.eval()
    mine, theirs = (fixed_inputs(each, trial.encoded(each)) for each in (ours, base))
    changed = [
        name
        for name, tensor in ours.dit.state_dict().items()
        if name in state and _is_other(tensor, state[name])
    ]
    if changed:
        raise LawBroken(f"{changed[0]} is not the base's: what is loaded must stay as it is")
    if mine.x0_btchw.shape != theirs.x0_btchw.shape or not torch.equal(mine.x0_btchw, theirs.x0_btchw):
        raise LawBroken("the clip itself is encoded otherwise than without the extension")
    if getattr(mine.dit, "frames_bfchw", None) is not None:
        return "the weights are the base's; appended frames take part in attention"
    widened = [n for n, tensor in added_weights(ours.dit, state).items() if n in state]
    tolerance = _WIDENED if widened else 0.0
    if mine.levels_bt is None:  # time features of single frames round otherwise than those of the sample
        mine = replace(mine, levels_bt=frame_timesteps(mine.timesteps_b, mine.x0_btchw.shape[1]))
    expected = _prediction(base, replace(mine, dit=theirs.dit))
    found = differing(_prediction(ours, mine), expected, tolerance=tolerance)
    how = "at initialisation" + ", to 1e-6: a projection was widened" * bool(widened)
    if found:
        expected = _prediction(base, replace(mine, dit=_dropped(base, trial)))
        found = differing(
            _prediction(ours, replace(mine, dit=_dropped(ours, trial))), expected, tolerance=tolerance
        )
        how = "with its conditions dropped"
    if found:
        raise LawBroken(
            f"the model does not begin as the base: {found}, at initialisation and with the conditions "
            f"dropped; begin at zero what {_names(ours.dit)} adds (zero_ of sat_train.extend)"
        )
    return how


def every_weight_gets_a_gradient(trial: ExtensionTrial) -> str:
    """Each new weight has a gradient after the first backward, and a non-zero one by the second step."""
    pipeline = trial.pipeline()
    added = {
        name: parameter
        for name, parameter in added_weights(pipeline.dit, _base_state(trial)).items()
        if parameter.requires_grad
    }
    if not added:
        raise NotApplicable("the extension adds no weight that trains")
    inputs = fixed_inputs(pipeline, trial.encoded(pipeline))
    moved: set[str] = set()
    for step in range(3):
        evaluate(pipeline, inputs)
        without = [name for name, parameter in added.items() if parameter.grad is None]
        if without and step == 0:
            raise LawBroken(
                f"{_listed(without)} got no gradient in the first backward: what they compute does not reach "
                "the loss, or was detached"
            )
        moved |= {name for name, parameter in added.items() if _has_effect(parameter)}
        with torch.no_grad():
            for parameter in pipeline.dit.parameters():
                if _has_effect(parameter):
                    parameter -= 1e-2 * parameter.grad / parameter.grad.abs().max()
    if still := sorted(added.keys() - moved):
        raise LawBroken(
            f"{_listed(still)} have zero gradients in three steps: behind a factor of zero, or behind two "
            "layers in a row that begin at zero"
        )
    return f"{len(added)} new weights"


def blocks_compile_once(trial: ExtensionTrial) -> str:
    """Blocks with the same modules share one compiled graph, and no graph breaks."""
    pipeline = trial.pipeline()
    inputs = fixed_inputs(pipeline, trial.encoded(pipeline))
    open_gates(pipeline, _base_state(trial))
    expected = evaluate(pipeline, inputs)
    torch._dynamo.reset()
    counters.clear()
    pipeline.dit.compile_blocks(backend="aot_eager")
    actual = evaluate(pipeline, inputs)
    if counters["graph_break"]:
        raise LawBroken(f"a block does not compile whole: {next(iter(counters['graph_break']))}")
    # one more where a frozen base begins: tokens have no gradient before the first module has added to them
    most, graphs = _patterns(pipeline.dit) + 1, counters["stats"]["unique_graphs"]
    if graphs > most:
        raise LawBroken(
            f"{graphs} graphs were compiled where {most} do for the sorts of blocks: a hook reads "
            "block.index, or a list by it; put the weights of a block into per_block and read `part`"
        )
    evaluate(pipeline, inputs)
    if counters["stats"]["unique_graphs"] > graphs:
        raise LawBroken("the second pass compiles again: a hook reads a Python number that changes")
    if found := differing(actual, expected, tolerance=_COMPILED):
        raise LawBroken(f"compiled, {found}")
    return f"{graphs} graphs for {len(pipeline.dit.blocks)} blocks"


def recomputing_changes_nothing(trial: ExtensionTrial) -> str:
    """Prediction, loss and gradients are equal bit for bit with and without activation checkpointing."""
    results = []
    for policy in ("off", "full"):
        pipeline = trial.pipeline(f"args.checkpoint_activations={policy}")
        open_gates(pipeline, _base_state(trial))
        results.append(evaluate(pipeline, fixed_inputs(pipeline, trial.encoded(pipeline))))
    if found := differing(results[1], results[0]):
        raise LawBroken(
            f"with checkpoint_activations, {found}: a hook inside a block keeps state, and runs twice"
        )
    return f"{len(results[0]) - 2} gradients"


def order_decides_nothing(trial: ExtensionTrial) -> str:
    """The order in which modules are added to the model, and conditions read, changes no bit."""
    pipeline = trial.pipeline()
    modules = {name[len("mixins.") : -1]: m for name, m in pipeline.dit.modules_of_its_own().items()}
    if len(modules) + len(pipeline.conditions) < 3:
        raise NotApplicable("there is one module and one condition")
    open_gates(pipeline, _base_state(trial))
    batch = trial.encoded(pipeline)
    expected = evaluate(pipeline, fixed_inputs(pipeline, batch))
    for name in modules:
        pipeline.dit.del_mixin(name)
    for name, module in reversed(modules.items()):
        pipeline.dit.add_mixin(name, module)
    pipeline.conditions = tuple(reversed(pipeline.conditions))
    if found := differing(evaluate(pipeline, fixed_inputs(pipeline, batch)), expected):
        raise LawBroken(f"with modules and conditions in reverse order, {found}")
    return f"{len(modules)} modules, {len(pipeline.conditions)} conditions"


def shapes_do_not_interfere(trial: ExtensionTrial) -> str:
    """Two sizes of one process, as buckets have them, do not change each other."""
    pipeline = trial.pipeline()
    open_gates(pipeline, _base_state(trial))
    first, other = (fixed_inputs(pipeline, trial.encoded(pipeline, *words)) for words in ((), OTHER_SHAPE))
    expected = evaluate(pipeline, first)
    evaluate(pipeline, other)
    if found := differing(evaluate(pipeline, first), expected):
        raise LawBroken(f"after a batch of another size, {found}: a table is kept for one size")
    sizes = [
        f"{each.x0_btchw.shape[1]}x{each.x0_btchw.shape[3]}x{each.x0_btchw.shape[4]}"
        for each in (first, other)
    ]
    return " and ".join(sizes)


def the_batch_comes_first(trial: ExtensionTrial) -> str:
    """Dimension 0 of each input of the network is the batch: guidance doubles it."""
    pipeline = trial.pipeline()
    inputs = fixed_inputs(pipeline, trial.encoded(pipeline))
    rows = len(inputs.x0_btchw)
    seen = _Extras()
    pipeline.dit.add_mixin("law_extras", seen)
    pipeline.dit.eval()
    with torch.no_grad():
        _call(pipeline, inputs, return_outputs=True)
    for name, tensor in {**inputs.dit.extras, **seen.found}.items():
        if tensor.dim() == 0 or len(tensor) != rows:
            raise LawBroken(
                f"extras '{name}' has the shape {list(tensor.shape)}: its first dimension is not the batch"
            )
    return f"{len(seen.found)} extras"


def dropping_concerns_its_own_rows(trial: ExtensionTrial) -> str:
    """A condition that is dropped from one sample changes the prediction of that sample, and of no other."""
    pipeline = trial.pipeline()
    open_gates(pipeline, _base_state(trial))
    pipeline.dit.eval()
    batch = trial.encoded(pipeline)
    felt = []
    for condition in pipeline.conditions:
        if condition.name not in trial.extended.model.conditions or not condition.tensors:
            continue
        dropped_b = torch.arange(ROWS) % (ROWS - 1) == 0  # the first and the last, at other timesteps
        encoded = condition.drop(batch.encodings[condition.name], dropped_b)
        less = with_encodings(batch, {condition.name: encoded})
        before, after = (_prediction(pipeline, fixed_inputs(pipeline, each)) for each in (batch, less))
        changed = [
            row
            for row, (a, b) in enumerate(
                zip(*(each["the prediction"] for each in (before, after)), strict=True)
            )
            if not torch.equal(a, b)
        ]
        if not {*changed} <= {0, ROWS - 1}:
            raise LawBroken(
                f"dropping {condition.name} from samples 0 and {ROWS - 1} changes samples {changed}: rows "
                "are mixed"
            )
        felt += [condition.name] * bool(changed)
    own = [each.name for each in pipeline.conditions if each.name in trial.extended.model.conditions]
    if not own:
        raise NotApplicable("there is no condition")
    return f"felt: {', '.join(felt) or 'none (its zeros, or only a loss reads it)'}"


class _Extras(Mixin):
    """Collects the extras that blocks see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def tap(self, hidden_bld: Tensor, block: DitBlock, forward: ForwardContext) -> None:
        for name, value in forward.extras.items():
            own = {f"{name}[{key}]": each for key, each in value.items()} if isinstance(value, dict) else {}
            self.found |= own if isinstance(value, dict) else {name: value}


def _call(pipeline: VideoDiffusion, inputs: TrainingInputs, **options: bool) -> Tensor:
    """Runs the network once, with taps if asked for; returns its prediction."""
    predictions: list[Tensor] = []

    def network(*args: Any, **kwargs: Any) -> Any:
        result = pipeline.dit(*args, **{**kwargs, **options})
        predictions.append(result[0] if isinstance(result, tuple) else result)
        return result if "return_outputs" in kwargs else predictions[-1]

    pipeline.loss(inputs, network=network)
    return predictions[0]


@torch.no_grad()
def _prediction(pipeline: VideoDiffusion, inputs: TrainingInputs) -> Results:
    return {"the prediction": _call(pipeline, inputs)}


def _dropped(pipeline: VideoDiffusion, trial: ExtensionTrial) -> DitInputs:
    """Returns the inputs of the network with each condition but the caption dropped from all samples."""
    batch = trial.encoded(pipeline)
    every = torch.ones(len(batch.sample_indices), dtype=torch.bool)
    dropped = {
        each.name: each.drop(batch.encodings[each.name], every)
        for each in pipeline.conditions
        if each.tensors and each.name != "text"
    }
    return fixed_inputs(pipeline, with_encodings(batch, dropped)).dit


def _base_state(trial: ExtensionTrial) -> Mapping[str, Tensor]:
    state: dict[str, Tensor] = load_file(trial.weights)
    return state


def _patterns(dit: DiffusionTransformer) -> int:
    """Returns the number of sorts of blocks: those with the same modules, and the blocks of each branch."""
    acting = dit.hooks.in_block
    sorts = Counter(
        tuple((hook, tuple(mixin.name for mixin, _ in acts)) for hook, acts in sorted(each.items()))
        for each in acting
    )
    return len(sorts) + sum(isinstance(module, BlockStack) for module in dit.modules())


def _has_effect(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _is_other(tensor: Tensor, base: Tensor) -> bool:
    return tensor.shape == base.shape and not torch.equal(tensor, base)


def _names(dit: DiffusionTransformer) -> str:
    names = [prefix.split(".")[1] for prefix in sorted(dit.modules_of_its_own())]
    return ", ".join(names) or "the extension"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
