"""`sat-train plan`: computes memory, time, disk and GPU-hours of a run before it is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sat_train.cli.options import MOST_GIB, MOST_GPUS, check_gpus, parse_options, positive
from sat_train.config import RunConfig, load_run_config
from sat_train.config.values import show_duration, show_figure
from sat_train.errors import ConfigError, Fault
from sat_train.log import configure_logging, get_logger

if TYPE_CHECKING:
    from sat_train.planning.gpu_memory import PhaseMemory
    from sat_train.planning.ladder import Climb, Rung
    from sat_train.planning.planner import Plan, Planner

log = get_logger(__name__)

_GB = 1e9
_GIB = 2**30
_WIDTH = 24
_MOST_EFFICIENCY = 2.0  # the assumed rates are two thirds of the peak: it is a factor, not per cent


def main(argv: Sequence[str]) -> int:
    """Plans the run that a command line describes.

    Args:
        argv: The words after `sat-train plan`.

    Returns:
        0 where it fits the card, 1 where it does not.

    Raises:
        ConfigError: With every fault.
    """
    options, base, words = parse_options(_parser(), argv)
    config = load_run_config(base, words, purpose="check", check_paths=False)
    if config.data is None:
        raise ConfigError(
            [Fault("data", "", "a section that gives the size of a clip: add configs/sft.yaml")]
        )
    check_gpus("--gpus", options.gpus, config)

    configure_logging()
    log.info("counting what a step of the model takes: up to half a minute for 5B")

    from sat_train.config.hardware import find_hardware
    from sat_train.distributed.processes import start_planned_rank  # imports torch
    from sat_train.planning.activations import settle
    from sat_train.planning.ladder import climb_down
    from sat_train.planning.planner import Planner

    card = find_hardware(options.hardware).scaled(options.efficiency)
    if options.gpu_memory is not None:
        card = replace(card, memory_gib=options.gpu_memory)
    start_planned_rank(config.args.model_parallel_size)
    planner = Planner(card, options.gpus)
    config = settle(planner, config)
    plan = planner.plan(config)

    def reload(rungs: Sequence[Rung]) -> RunConfig:
        files = [*base, *(file for rung in rungs for file in rung.files)]
        more = [*words, *(word for rung in rungs for word in rung.words)]
        return settle(planner, load_run_config(files, more, purpose="check", check_paths=False))

    climbs = [] if plan.fits else climb_down(planner, config, reload)
    faster = _faster(planner, plan, climbs, reload)
    print(_as_json(plan, climbs, faster) if options.json else as_text(plan, climbs, faster))
    return 0 if plan.fits else 1


def _faster(
    planner: Planner, plan: Plan, climbs: Sequence[Climb], reload: Callable[[Sequence[Rung]], RunConfig]
) -> Climb | None:
    """Returns what the card still has room to keep, where the run fits, or does with the rungs it took."""
    from sat_train.planning.ladder import use_memory

    taken = [climb.rung for climb in climbs]
    config, fits = reload(taken), climbs[-1].plan.fits if climbs else plan.fits
    if not fits or not config.args.recomputes:
        return None
    return use_memory(planner, config, lambda rungs: reload([*taken, *rungs]))


def _as_json(plan: Plan, climbs: Sequence[Climb], faster: Climb | None) -> str:
    tree: dict[str, Any] = asdict(plan)
    tree["phases"] = [{**asdict(phase), "total": phase.total} for phase in plan.phases]
    tree["step"] = {**asdict(plan.step), "total": plan.step.total}
    tree |= {"fits": plan.fits, "samples_per_second": plan.samples_per_second}
    tree["ladder"] = [_climb_tree(climb) for climb in climbs]
    tree["faster"] = None if faster is None else _climb_tree(faster)
    return json.dumps(tree, indent=2)


def _climb_tree(climb: Climb) -> dict[str, Any]:
    return {**asdict(climb.rung), "total": climb.plan.peak.total, "step_s": climb.plan.step.total}


def as_text(plan: Plan, climbs: Sequence[Climb], faster: Climb | None) -> str:
    """Returns what the command prints.

    Args:
        plan: Of the run as it is configured.
        climbs: Measures that were taken until it fits, the last one with all of them.
        faster: What the card still has room for; None: nothing.
    """
    lines = [*_head(plan), "", *_memory_table(plan), "", *_time_lines(plan)]
    if not plan.fits:
        lines += ["", *_ladder_lines(plan, climbs)]
    if faster is not None:
        lines += ["", "Faster, and the card has room for it:", _climb_line(faster)]
    return "\n".join([*lines, "", "Computed, not measured."])


def _head(plan: Plan) -> list[str]:
    rows = [
        ("GPUs", f"{plan.gpus} x {plan.hardware.name}, {plan.hardware.memory_gib:g} GiB each"),
        ("weights of a rank", f"{plan.weights:,}, of which {plan.trained:,} train"),
        ("blocks", "compiled, which takes compute capability 7.0" if plan.compiled else "not compiled"),
        ("activations", plan.activations),
        ("samples", f"{plan.samples} a step, {plan.tokens:,} tokens each"),
    ]
    return [f"{name:<{_WIDTH}}{text}" for name, text in rows]


def _memory_table(plan: Plan) -> list[str]:
    names = ("weights", "gradients", "optimizer", "activations", "buffers", "encoders", "total", "host")
    lines = [f"{'GB of one GPU':<14}" + "".join(f"{name:>12}" for name in names)]
    lines += [
        f"{phase.phase:<14}" + "".join(f"{getattr(phase, name) / _GB:>12.1f}" for name in names)
        for phase in plan.phases
    ]
    return lines


def _time_lines(plan: Plan) -> list[str]:
    step = asdict(plan.step)
    parts = ", ".join(f"{name} {show_figure(seconds)}" for name, seconds in step.items() if seconds)
    work = show_figure(plan.tflops)
    rows = [
        ("a step", f"{show_figure(plan.step.total)} s ({parts})"),
        ("MFU", f"{plan.mfu:.1%} of {plan.hardware.peak_tflops:g} TFLOP/s, {work} TFLOP a GPU"),
        ("throughput", f"{show_figure(plan.samples_per_second)} samples/s"),
        ("checkpoint", f"{show_figure(plan.checkpoint_bytes / _GB)} GB"),
        ("cache", f"{_cache_of_thousand(plan)} for 1,000 captioned clips, one view each"),
    ]
    if plan.hours is None:
        rows.append(("the run", "as long as its data: args.train_iters says how long before they are read"))
    else:
        hours = f"{show_duration(plan.hours * 3600)}, {show_figure(plan.hours * plan.gpus)} GPU-hours"
        rows.append(("the run", f"{hours}, for {plan.steps:,} steps, with validation and saves"))
    return [f"{name:<{_WIDTH}}{text}" for name, text in rows]


def _cache_of_thousand(plan: Plan) -> str:
    time = show_duration(plan.encoded_clip_s * 1000 / plan.gpus)
    names = ", ".join(plan.uncounted_conditions)
    others = f" (without what {names} keeps)" if names else ""
    return f"{show_figure(plan.cached_clip_bytes * 1000 / _GB)} GB{others} and {time}"


def _ladder_lines(plan: Plan, climbs: Sequence[Climb]) -> list[str]:
    peak: PhaseMemory = plan.peak
    memory = plan.hardware.memory_gib * _GIB / _GB
    lines = [f"This does not fit: {peak.phase} takes {peak.total / _GB:.1f} GB, the card has {memory:.1f}."]
    for climb in climbs:
        lines.append(_climb_line(climb))
    if not climbs or not climbs[-1].plan.fits:
        return [*lines, "Nothing makes it fit: take more GPUs, a larger card, or shorter or smaller clips."]
    files = [file for climb in climbs for file in climb.rung.files]
    words = {word.partition("=")[0]: word for climb in climbs for word in climb.rung.words}
    typed = " ".join([*files, *words.values()])
    return [*lines, "It fits with all of these, files behind the others of --base:", f"  {typed}"]


def _climb_line(climb: Climb) -> str:
    typed = " ".join([*climb.rung.files, *climb.rung.words])
    figures = f"{climb.plan.peak.total / _GB:.1f} GB, {show_figure(climb.plan.step.total)} s a step"
    return f"  {figures:<30}{climb.rung.meaning}: {typed}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train plan",
        description="Computes what a run takes of GPUs, hosts and disks; if it does not fit, what to change.",
        usage="sat-train plan --base FILE [FILE ...] [key.path=value ...] [--flag value ...] "
        "[--extension NAME ...] [--gpus N] [--hardware NAME] [--gpu-memory GIB] [--efficiency X] [--json]",
        allow_abbrev=False,
    )
    gpus = positive(int, MOST_GPUS)
    parser.add_argument("--gpus", type=gpus, default=1, metavar="N", help="GPUs of the run")
    parser.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME",
        help="h100, h200, a100, a100-40, l40s or rtx4090",
    )
    parser.add_argument(
        "--gpu-memory", type=positive(float, MOST_GIB), metavar="GIB", help="its memory, where it differs"
    )
    parser.add_argument(
        "--efficiency",
        type=positive(float, _MOST_EFFICIENCY),
        default=1.0,
        metavar="X",
        help="factor on the rates that the card is assumed to reach",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
