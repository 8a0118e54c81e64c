"""Config -> the models of a run, with their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sat_train.checkpoint.consolidate import read_computing_weights
from sat_train.checkpoint.find import ResumePoint
from sat_train.checkpoint.layout import step_folder
from sat_train.checkpoint.manifest import BaseWeights
from sat_train.config import RunConfig
from sat_train.config.facts import RunFacts
from sat_train.config.rules import warnings_of_run
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.build import build_encoders, turns_for_text
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.engine.compilation import compiles_blocks
from sat_train.errors import CheckpointError, ConfigError, Fault
from sat_train.interchange.adapters import (
    holds_adapters,
    merge_updates,
    read_given_loras,
    updates_of,
    without_adapters,
)
from sat_train.interchange.locate import (
    Located,
    base_weights_at,
    find_base,
    locate_weights,
    read_base,
    read_located,
    unflattened,
)
from sat_train.interchange.module_files import check_module_files, read_module_files
from sat_train.interchange.shared_loading import load_weights_once
from sat_train.interchange.surgery import (
    PROJECTION,
    Surgery,
    describe_surgery,
    fill_absent,
    fit_weights,
    versions,
)
from sat_train.log import get_logger
from sat_train.models.adapter import adapted_layers, adapter_state_dict, start_adapters
from sat_train.models.build import build_dit, compute_dtype
from sat_train.models.dit.sharding import full_shape
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.encoders import Encoders
from sat_train.models.frozen_layers import hold_frozen_weights
from sat_train.models.loaded_adapters import load_updates
from sat_train.models.low_rank import Updates, highest_rank, scales_of, stacked
from sat_train.models.recomputation import set_recomputation
from sat_train.models.trainable import frozen_base, select_configured
from sat_train.objective.build import build_pipeline
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.training.base_check import check_starts_as_base
from sat_train.weights.lazy import LazyWeights
from sat_train.weights.tensor_parallel import slice_weights

log = get_logger(__name__)


def build_models(
    config: RunConfig,
    mesh: ProcessMesh,
    start: StartWeights,
    encoders: Encoders | None = None,
    *,
    with_encoders: bool = True,
    sample: Callable[[], EncodedBatch] | None = None,
) -> VideoDiffusion:
    """Builds transformer, autoencoder and text encoder with their weights, and logs the trainable weights.

    Args:
        config: The configuration.
        mesh: The process mesh.
        start: Source of the transformer's weights.
        encoders: Those of the run; None builds them.
        with_encoders: If off, all batches should come from the cache; an encoder is loaded only if one does
            not.
        sample: Gives an encoded sample, on which a new run with more than its base's weights is compared with
            that base; None: it is not.

    Raises:
        ConfigError: An adapter's target or a prefix of frozen weights matches nothing.
        CheckpointError: Weights are missing, damaged or of another shape.

    Ranks: all.
    """
    dit, surgery = _build_trained(config, mesh, start)
    encoders = encoders or build_encoders(config, mesh.device, in_turn=turns_for_text(mesh))
    decoding = [name for name, term in config.spec.loss_terms.items() if term.params.decodes]
    if with_encoders:
        encoders.load()
    elif decoding:
        log.info("the VAE is loaded for the loss term %s, which decodes", ", ".join(decoding))
        encoders.load(text=False)
    pipeline = build_pipeline(config, dit=dit, encoders=encoders)
    if sample is not None and surgery is not None and surgery.is_any:
        check_starts_as_base(pipeline, sample(), surgery)
    return pipeline


@dataclass(frozen=True)
class StartWeights:
    """Sources of the transformer's weights, the same on all ranks.

    Args:
        located: Weights to load; None for random weights.
        base: Base weights, which the checkpoints of a run with a frozen base name but do not contain; None
            where checkpoints hold all weights.
        lora: Adapters from elsewhere to start from.
        strength: Factor on each of these adapters, or one for all.
        modules: Files with weights of network modules, over those of `located`.
        resumed: The checkpoint that a run resumes from. Without `located` it holds all weights.
        kept: Names of weights that differ from the base's, which checkpoints hold even where they are frozen.
    """

    located: Located | None = None
    base: BaseWeights | None = None
    lora: tuple[str, ...] = ()
    strength: tuple[float, ...] = (1.0,)
    modules: tuple[str, ...] = ()
    resumed: ResumePoint | None = None
    kept: frozenset[str] = frozenset()

    def left_out(self, dit: DiffusionTransformer, *, model_size: int) -> frozenset[str]:
        """Returns the names of the weights that checkpoints leave to the base that they name.

        Those are frozen, and the base has them in this shape: not what a model has beyond its base.
        """
        if self.base is None:
            return frozenset()
        base, frozen = read_base(self.base).shapes, frozen_base(dit)
        whole = {name: full_shape(name, shape, model_size) for name, shape in frozen.items()}
        same = {
            name for name in whole if name in base and unflattened(base[name], whole[name]) == whole[name]
        }
        return frozenset(same) - self.kept


def find_start_weights(
    config: RunConfig, mesh: ProcessMesh, point: ResumePoint | None = None
) -> StartWeights:
    """Finds the initial weights of a run, by path and hash.

    A resumed run with a frozen base uses the base weights that it recorded, whatever `args.load` names by
    now, and what it trains from the checkpoint. A LoRA run that starts from another one uses that run's base.

    Args:
        config: The configuration.
        mesh: The process mesh.
        point: The checkpoint that the run resumes from.

    Raises:
        CheckpointError: On all ranks alike: they are missing, damaged, or other base weights.

    Ranks: all; rank 0 searches and hashes.
    """
    return on_rank_0(mesh, lambda: _find_start_weights(config, point))


def _find_start_weights(config: RunConfig, point: ResumePoint | None) -> StartWeights:
    args = config.args
    if point is not None and point.manifest.base_weights is not None:
        recorded = find_resumed_base(point, args.load_base, args.load)
        step = step_folder(point.run_directory, point.step)
        kept = frozenset(read_computing_weights(step, point.manifest))
        return StartWeights(locate_weights(recorded.source), recorded, resumed=point, kept=kept)
    if point is not None:
        return StartWeights(resumed=point)
    if args.load is None:
        return StartWeights()
    located = locate_weights(args.load, load_base=args.load_base)
    modules = args.load_modules or ()
    check_module_files(modules, config, located.path)
    return StartWeights(
        located,
        _named_base(config, located),
        args.load_lora or (),
        args.lora_strength,
        modules,
        kept=frozenset(read_module_files(modules)),
    )


def _named_base(config: RunConfig, located: Located) -> BaseWeights | None:
    """Returns the weights that checkpoints name instead of holding them; None where they hold all weights."""
    is_lora = config.spec.adapter is not None
    if is_lora and located.base is not None and holds_adapters(located):
        return located.base  # its adapters go on as the run's own
    if is_lora or (config.freezes_base and not config.args.load_lora):
        return base_weights_at(located.path)
    return None


def find_resumed_base(point: ResumePoint, load_base: str | None, load: str | None) -> BaseWeights:
    """Returns the base weights of a resumed run: at `load_base`, else as recorded, else at `load`."""
    folder = step_folder(point.run_directory, point.step)
    try:
        return find_base(folder, point.manifest, load_base=load_base)
    except CheckpointError:
        if load_base is not None or load is None:
            raise
        return find_base(folder, point.manifest, load_base=load)


def build_trained_dit(config: RunConfig, mesh: ProcessMesh, start: StartWeights) -> DiffusionTransformer:
    """Builds the transformer with loaded or new weights, and freezes the weights that do not train."""
    return _build_trained(config, mesh, start)[0]


def _build_trained(
    config: RunConfig, mesh: ProcessMesh, start: StartWeights
) -> tuple[DiffusionTransformer, Surgery | None]:
    """Returns the transformer, and what it has beyond the base from which a new run starts."""
    is_held = holds_base(config)
    dit = build_dit(
        config.spec,
        device="cpu" if is_held else mesh.device,
        dtype=compute_dtype(config.args),
        recompute=config.args.recompute,
        inputs_on_host=config.args.checkpoint_offload,
        seed=config.args.seed,
        initialize=start.located is None and start.resumed is None,
    )
    updates: Updates = {}
    surgery = None
    if start.located is not None:
        updates, surgery = load_first_weights(
            dit, mesh, start, has_adapters=config.spec.adapter is not None, seed=config.args.seed
        )
    if start.resumed is not None:
        load_resumed_weights(dit, mesh, start.resumed, over_base=start.located is not None)
    else:
        start_adapters(dit, mesh, seed=config.args.seed)
        if updates:
            load_updates(dit, updates)
            _describe_adapters(config, dit, updates)
    summary = select_configured(dit, config.model)
    log.info("weights of the transformer%s:\n%s", _of_one_rank(mesh), summary)
    if surgery is not None:
        check_zeros_train(dit, surgery)
    if is_held:
        _hold_base(config, dit, mesh, start)
    set_recomputation(dit, config, compiled=compiles_blocks(config.args, mesh.device))
    return dit, surgery if start.resumed is None else None


def holds_base(config: RunConfig) -> bool:
    """Returns whether the frozen base is held in few bits or in host memory; it is loaded there first."""
    return config.args.quantize_base != "off" or config.args.block_swap > 0


def _hold_base(config: RunConfig, dit: DiffusionTransformer, mesh: ProcessMesh, start: StartWeights) -> None:
    """Changes how the frozen base is held, and moves the rest to the device.

    Raises:
        ConfigError: The base has random weights, which checkpoints would have to hold.
    """
    if start.base is None:
        expected = "weights to start from: a base in few bits or in host memory is not saved with the run"
        raise ConfigError([Fault("args.load", str(config.args.load), expected)])
    args = config.args
    hold_frozen_weights(dit, device=mesh.device, quantization=args.quantize_base, swapped=args.block_swap)
    dit.to(mesh.device)


def load_resumed_weights(
    dit: DiffusionTransformer, mesh: ProcessMesh, point: ResumePoint, *, over_base: bool = False
) -> None:
    """Loads the weights of a checkpoint in their forward dtype; the fp32 masters are loaded later.

    Args:
        dit: The transformer.
        mesh: The process mesh.
        point: The checkpoint.
        over_base: The base is loaded already: the checkpoint holds the rest, which is what trains and what
            adapters and added modules keep.
    """
    whole = read_computing_weights(step_folder(point.run_directory, point.step), point.manifest)
    may_lack: Collection[str] = dit.derived_keys()
    if over_base:
        known = dit.state_dict().keys()
        own = known - dit.derived_keys()
        whole, may_lack = whole.select(lambda key: key if key in own else None), known
    weights = slice_weights(whole, rank=mesh.model_rank, size=mesh.model_size)
    load_weights_once(dit, weights, mesh, may_lack=may_lack)


def load_first_weights(
    dit: DiffusionTransformer, mesh: ProcessMesh, start: StartWeights, *, has_adapters: bool, seed: int
) -> tuple[Updates, Surgery]:
    """Loads weights into a trainable transformer; adapters are merged where it has none of its own.

    What the model has beyond these weights begins as it adds nothing, and a table says what that is.

    Returns:
        The adapters that are still to be loaded, and what the weights do not contain.
    """
    assert start.located is not None, "there are weights to load"
    base, updates = read_weights_and_updates(start)
    if updates and not has_adapters:
        log.info("the LoRA adapters are merged into the weights: this run trains all of them")
        base = merge_updates(base, updates)
    new = {
        prefix: mixin
        for prefix, mixin in dit.modules_of_its_own().items()
        if not any(key.startswith(prefix) for key in base)
    }
    own = {key for key in dit.state_dict() if key.startswith(tuple(new))} | adapter_state_dict(dit).keys()
    fitted = fit_weights(dit, base)
    load_weights_once(
        dit,
        slice_weights(fitted.weights, rank=mesh.model_rank, size=mesh.model_size),
        mesh,
        may_lack=dit.derived_keys() | own | fitted.absent,
    )
    fill_absent(dit, fitted.absent, seed=seed)
    before = versions(dit)
    for mixin in new.values():
        mixin.reinit(dit)
    surgery = Surgery(
        modules=frozenset(mixin.name for mixin in new.values()),
        channels=fitted.widened_from or dit.spec.in_channels,
        projection=base[PROJECTION] if fitted.widened_from else None,
    )
    if surgery.is_any:
        shapes = slice_weights(base, rank=mesh.model_rank, size=mesh.model_size).shapes
        table = describe_surgery(dit, shapes, before)
        log.info("%s has a part of the model%s:\n%s", base.where, _of_one_rank(mesh), table)
    return (updates if has_adapters else {}), surgery


def check_zeros_train(dit: DiffusionTransformer, surgery: Surgery) -> None:
    """Checks that new input channels train: their weights begin at zero, and would stay there.

    Raises:
        ConfigError: The projection of patches is frozen.
    """
    if surgery.projection is not None and not dit.get_parameter(PROJECTION).requires_grad:
        text = (
            f"trained: the weights that args.load names read {surgery.channels} of {dit.spec.in_channels} "
            "channels, and the others begin at zero. Train it (model.train, without adapters), or load "
            "weights that read them"
        )
        raise ConfigError([Fault(PROJECTION, "frozen", text)])


def read_weights_and_updates(start: StartWeights, *, ema: bool = False) -> tuple[LazyWeights, Updates]:
    """Returns the weights under the adapters, and the adapters: their own and those of `start.lora`."""
    assert start.located is not None, "there are weights to load"
    whole = read_located(start.located, ema=ema)
    updates = updates_of(whole)
    updates = stacked(updates, read_given_loras(start.lora, start.strength))
    return without_adapters(whole).overlaid(read_module_files(start.modules)), updates


def _describe_adapters(config: RunConfig, dit: DiffusionTransformer, updates: Updates) -> None:
    """Logs the adapters that a run starts from, and warns if their scale is another one."""
    log.info("starts from the LoRA adapters of %d layers, rank %d", len(updates), highest_rank(updates))
    adapters = {name: layer.adapter for name, layer in adapted_layers(dit) if name in updates}
    spare = sum(adapter.rank > highest_rank({name: updates[name]}) for name, adapter in adapters.items())
    if spare:
        log.info("the last ranks of %d adapters start at zero", spare)
    for warning in warnings_of_run(config, RunFacts(adapter_scales=tuple(scales_of(updates)))):
        log.warning("%s", warning)


def _of_one_rank(mesh: ProcessMesh) -> str:
    return f" (one of {mesh.model_size} slices)" if mesh.model_size > 1 else ""
