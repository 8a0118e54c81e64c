"""Changes to a run that does not fit: one rung after the other, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sat_train.config import RunConfig
from sat_train.config.parts.record import Recompute
from sat_train.models.dit.recompute import POLICIES
from sat_train.planning.activations import share_that_fits
from sat_train.planning.planner import Plan, Planner, needs_encoders

_LEAST_SAVING = 0.01  # of memory or time, for which a rung is worth its words


@dataclass(frozen=True)
class Rung:
    """One way to need less memory, on top of the rungs before it.

    Args:
        meaning: What it does, and at what price.
        words: What to type.
        files: Configuration files to add.
    """

    meaning: str
    words: tuple[str, ...]
    files: tuple[str, ...] = ()


def memory_ladder(config: RunConfig, *, gpus: int) -> Iterator[Rung]:
    """Yields the ways to need less memory that this configuration leaves, the cheapest first."""
    args, stage = config.args, config.args.zero_stage
    words: tuple[str, ...]
    if needs_encoders(config):
        words = ("data.cache=require", "data.cache_dir=cache", "args.valid_video_interval=null")
        yield Rung("encode beforehand, no validation videos: T5 and VAE are not loaded", words)
    if args.text_encoder_device == "auto":
        yield Rung("T5 on the CPU; seconds a caption", ("args.text_encoder_device=cpu",))
    if not config.spec.vae.tiling:
        tiles = "model.first_stage_config.params.tiling=true"
        yield Rung("encode in tiles; seams are blended, so other latents", (tiles,))
    # with frozen weights `gemm` keeps more than `off`
    policies = tuple(each for each in POLICIES if each != "gemm" or not config.spec.adapter)
    at = policies.index(args.recompute) if args.recompute in policies else 0
    for policy in policies[at + 1 :] if args.checkpoint_budget is None else POLICIES[-1:]:
        yield _recomputing(config, policy)
    if args.batch_size > 1:
        accumulated = args.batch_size * args.gradient_accumulation_steps
        words = ("args.batch_size=1", f"args.gradient_accumulation_steps={accumulated}")
        yield Rung("one sample at a time, as many a step as before", words)
    if not args.checkpoint_offload:
        policy = args.recompute if args.recomputes else "full"
        words = ("args.checkpoint_offload=true", f"args.checkpoint_activations={policy}", *_eager(config))
        yield Rung("inputs of recomputed blocks in host memory; blocks are not compiled", words)
    yield from _rungs_of_the_states(config, gpus)
    if config.spec.adapter is None:
        yield Rung("train adapters instead of all weights", (), ("configs/lora.yaml",))
    if config.freezes_base and stage < 3 and (config.spec.adapter or not args.load_lora):
        yield from _rungs_of_a_frozen_base(config)
    if config.deepspeed.zero_optimization.offload_optimizer.device == "none":
        offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        words = (f"args.zero_stage={max(stage, 2)}", "deepspeed.optimizer.type=AdamW", offload)
        yield Rung("optimizer states in host memory; much slower", words)


def _rungs_of_a_frozen_base(config: RunConfig) -> Iterator[Rung]:
    args, layers = config.args, config.spec.layers
    for count in sorted({max(layers // 2, 3), layers}):
        if args.block_swap < count <= layers:
            words = (f"args.block_swap={count}", *_eager(config))
            yield Rung("weights of blocks in host memory; blocks are not compiled", words)
    kinds = ("off", "int8", "nf4")
    for kind in kinds[kinds.index(args.quantize_base) + 1 :]:
        yield Rung("the frozen base in few bits; other numbers", (f"args.quantize_base={kind}",))


def _eager(config: RunConfig) -> tuple[str, ...]:
    return ("args.compile=auto",) if config.args.compile == "blocks" else ()


def _rungs_of_the_states(config: RunConfig, gpus: int) -> Iterator[Rung]:
    stage, optimizer = config.args.zero_stage, config.deepspeed.optimizer.type
    shares = gpus > config.args.model_parallel_size
    if shares and stage < 2:
        yield Rung("divide gradients and states over the GPUs", ("args.zero_stage=2",))
    if optimizer in ("Adam", "AdamW") and stage < 3 and config.args.model_parallel_size == 1:
        yield Rung("moments in 8 bits; needs bitsandbytes", ("deepspeed.optimizer.type=AdamW8bit",))
    if shares and stage < 3 and not config.freezes_base:
        words = ("args.zero_stage=3", "deepspeed.optimizer.type=AdamW", "args.compile=off")
        yield Rung("divide the weights over the GPUs too; slower", words)


@dataclass(frozen=True)
class Climb:
    """A rung with what the run then takes.

    Args:
        rung: The rung.
        plan: The run with this rung and those before it.
    """

    rung: Rung
    plan: Plan


def climb_down(
    planner: Planner, config: RunConfig, reload: Callable[[Sequence[Rung]], RunConfig]
) -> list[Climb]:
    """Returns the rungs that a run has to take until it fits, each with its plan; all if none makes it fit.

    A rung counts where it lowers the highest phase; one that does not is tried again after the others.

    Args:
        planner: The planner of the card.
        config: The run that does not fit.
        reload: Reads the configuration with the words and files of some rungs.
    """
    taken: list[Climb] = []
    plan = planner.plan(config)
    while not plan.fits:
        climb = _next_rung(planner, config, plan, [each.rung for each in taken], reload)
        if climb is None:
            break
        taken.append(climb)
        plan, config = climb.plan, reload([each.rung for each in taken])
    return taken


def use_memory(
    planner: Planner, config: RunConfig, reload: Callable[[Sequence[Rung]], RunConfig]
) -> Climb | None:
    """Returns the share of activations that a run has room to keep, with the faster run; None if it has none.

    Args:
        planner: The planner of the card.
        config: A run that fits and recomputes.
        reload: Reads its configuration with the words of some rungs.
    """
    share = share_that_fits(planner, config)
    if not share:
        return None
    rung = _recomputing(config, "off") if share == 1 else _keeping(config, share)
    filled = planner.plan(reload([rung]))
    faster = filled.step.total < planner.plan(config).step.total * (1 - _LEAST_SAVING)
    return Climb(rung, filled) if faster else None


def _recomputing(config: RunConfig, policy: Recompute) -> Rung:
    """Returns the rung to a policy for all blocks."""
    args = config.args
    words = [f"args.checkpoint_activations={policy}"]
    words += ["args.checkpoint_every=1"] * (args.checkpoint_every > 1)
    words += ["args.checkpoint_budget=null"] * (args.checkpoint_budget is not None)
    more = policy != "off"
    words += ["args.checkpoint_offload=false"] * (args.checkpoint_offload and not more)
    return Rung("recompute more in the backward pass; slower" if more else "keep everything", tuple(words))


def _keeping(config: RunConfig, share: float) -> Rung:
    """Returns the rung to a share of activations that are kept."""
    args = config.args
    words = [f"args.checkpoint_budget={share:g}"]
    words += ["args.checkpoint_activations=full"] * (args.checkpoint_activations in ("gemm", "attention"))
    words += ["args.checkpoint_every=1"] * (args.checkpoint_every > 1)
    return Rung("keep what the card has room for", tuple(words))


def _next_rung(
    planner: Planner,
    config: RunConfig,
    plan: Plan,
    taken: Sequence[Rung],
    reload: Callable[[Sequence[Rung]], RunConfig],
) -> Climb | None:
    for rung in memory_ladder(config, gpus=planner.gpus):
        changed = reload([*taken, rung])
        most = max(phase.total for phase in planner.phases(changed))
        if most < plan.peak.total * (1 - _LEAST_SAVING):
            return Climb(rung, planner.plan(changed))
    return None
