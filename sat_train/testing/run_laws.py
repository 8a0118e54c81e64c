"""Laws that whole runs on two ranks try: resume, ZeRO, tensor parallelism, cache."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sat_train.checkpoint.fragments import MASTER, read_fragments
from sat_train.checkpoint.layout import SAT_PREFIX, model_file_name
from sat_train.checkpoint.manifest import read_manifest
from sat_train.config import load_run_config
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import ConfigError
from sat_train.interchange.conversion import Conversion, convert
from sat_train.models.dit.sharding import tensor_parallel_layout
from sat_train.testing.pool import FailedOnRank, RankPool
from sat_train.testing.trial import (
    PRESET,
    ExtensionTrial,
    LawBroken,
    NotApplicable,
    Results,
    differing,
    evaluate,
    fixed_inputs,
)
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.weights.readers import load_torch_file

STEPS = 4
_RANKS = 2
_SUMMED = 1e-4  # relative: ranks add in another order, and Adam enlarges what this leaves of small gradients


class TrainedRuns:
    """Short runs of an extended model on two ranks, each of which is trained once.

    Args:
        trial: The extension.
        pool: The rank processes.
    """

    def __init__(self, trial: ExtensionTrial, pool: RankPool) -> None:
        self._trial, self._pool = trial, pool
        self._runs: dict[str, tuple[Path, tuple[str, ...]]] = {}

    def folder(self, name: str, *words: str, model_parallel_size: int = 1) -> Path:
        """Returns the run directory of a run that is trained now if it has not been.

        Args:
            name: Its name.
            words: Words besides those of the trial.
            model_parallel_size: Ranks that share the model.

        Raises:
            LawBroken: The run fails.
            ConfigError: It is refused.
        """
        if name not in self._runs:
            self._train(name, *words, model_parallel_size=model_parallel_size)
            (folder,) = (self._trial.folder / "runs").glob(f"{name}-*")
            self._runs[name] = folder, words
        return self._runs[name][0]

    def resume(self, folder: Path, step: int) -> None:
        """Trains a finished run again from one of its steps."""
        name, words = next((name, words) for name, (own, words) in self._runs.items() if own == folder)
        self._train(name, *words, f"args.resume={folder / str(step)}")

    def straight(self) -> Path:
        """Returns the run that others are compared with: ZeRO stage 2, all steps."""
        return self.folder("straight")

    def _train(self, name: str, *words: str, model_parallel_size: int = 1) -> None:
        own = (
            *(f"args.experiment_name={name}", f"args.train_iters={STEPS}", "args.save_interval=2"),
            *("args.lr=1e-3", "args.distributed_timeout_minutes=1"),
        )
        command = self._trial.command(*own, *words)
        try:
            refusals = self._pool.run(
                _RANKS,
                train_run,
                [PRESET, *self._trial.files],
                command,
                model_parallel_size=model_parallel_size,
            )
        except FailedOnRank as failure:
            raise LawBroken(
                f"the run {name} ({' '.join(words)}) fails: {_last_lines(str(failure))}"
            ) from None
        if refusals[0]:
            raise ConfigError(refusals[0])


def train_run(mesh: ProcessMesh, files: list[str], words: list[str]) -> list[object]:
    """Trains a run; returns the faults of a configuration that is refused."""
    from sat_train.training.build import train

    try:
        train(load_run_config(files, words), mesh)
    except ConfigError as error:
        return list(error.faults)
    return []


def a_resumed_run_is_the_same_run(trial: ExtensionTrial, runs: TrainedRuns) -> str:
    """A run that is resumed in the middle ends with the losses, weights and optimizer of one that is not."""
    count = _resume(runs, runs.straight())
    return f"{count} tensors after {STEPS} steps"


def zero_stages_agree(trial: ExtensionTrial, runs: TrainedRuns) -> str:
    """ZeRO stages 1, 2 and 3 train the same on two ranks."""
    expected = losses_of(runs.straight())
    whole = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"  # tiny weights are divided too
    for stage, words in ((3, [whole]), (1, [])):
        actual = losses_of(runs.folder(f"stage{stage}", f"args.zero_stage={stage}", *words))
        if found := _apart(actual, expected):
            raise LawBroken(
                f"at ZeRO stage {stage} {found}: weights must be in modules that are called, part(x), never "
                "read as part.weight"
            )
    return "1, 2 and 3 on 2 ranks"


def tensor_parallelism_agrees(trial: ExtensionTrial, runs: TrainedRuns) -> str:
    """Two ranks that share the model train what two that share the samples train, or are refused by name."""
    if trial.extended.spec.heads % _RANKS:
        raise NotApplicable(f"a model with {trial.extended.spec.heads} heads cannot be divided")
    batch = 2 * trial.extended.args.batch_size
    words = (f"args.model_parallel_size={_RANKS}", f"args.batch_size={batch}")
    expected = losses_of(runs.straight())
    try:
        folder = runs.folder("tensor_parallel", *words, model_parallel_size=_RANKS)
    except ConfigError as error:
        return f"refused: {error.faults[0]}"
    if found := _apart(losses_of(folder), expected):
        raise LawBroken(
            f"with model_parallel_size 2 {found}: what a hook sees of attention is this rank's heads; say "
            "`tensor_parallel = 'refused'` if it needs all"
        )
    copies = [_replicated(folder / str(STEPS), rank) for rank in range(_RANKS)]
    if found := differing(copies[1], copies[0], tolerance=_SUMMED):
        raise LawBroken(
            f"with model_parallel_size 2 the copies drift apart, {found}: its gradient is a part of the sum; "
            "say `tensor_parallel = 'refused'`, or sum it over the ranks"
        )
    return f"{len(copies[0])} replicated weights alike"


def the_cache_changes_no_loss(trial: ExtensionTrial, runs: TrainedRuns) -> str:
    """Encodings that are filled into the cache, and those read from it, give the losses of a run without."""
    cache = f"data.cache_dir={trial.folder}/cache"
    expected = losses_of(runs.straight())
    for name in ("fill", "require"):
        try:
            actual = losses_of(runs.folder(f"cache_{name}", cache, f"data.cache={name}"))
        except LawBroken as broken:
            raise LawBroken(f"with data.cache={name}, {broken}") from None
        if actual != expected:
            raise LawBroken(
                f"with data.cache={name} the losses are {actual}, not {expected}: an encoding depends on "
                "something that its entry does not name: random numbers (`augments`), a file, earlier samples"
            )
    return "filled and read"


def exported_modules_are_the_same(trial: ExtensionTrial, runs: TrainedRuns) -> str:
    """A frozen base is not saved with a run, which resumes; its modules, exported, predict what it does."""
    if not trial.extended.spec.modules:
        raise NotApplicable("there is no module")
    folder = runs.folder("exported", "model.not_trainable_prefixes=[all]")
    own = tuple(f"mixins.{name}." for name in trial.extended.spec.modules)
    trained = read_fragments(folder / str(STEPS), read_manifest(folder / str(STEPS))).shapes
    if of_base := [name for name in trained if not name.startswith(own)]:
        raise NotApplicable(f"the YAML files train weights of the base too, such as {min(of_base)}")
    saved = {
        name.removeprefix(SAT_PREFIX)
        for name in load_torch_file(folder / str(STEPS) / model_file_name(0))["module"]
    }
    if strays := sorted(name for name in saved if name.startswith("transformer.layers.")):
        raise LawBroken(f"the base is frozen, and the checkpoint holds {strays[0]}")
    config = trial.config()
    dest = trial.folder / "modules"
    convert(Conversion(folder, dest, "modules", model=config.spec, extensions=config.extensions.tree()))
    predictions = []
    for words in ([f"args.load={folder}"], [f"args.load_modules={dest}"]):
        pipeline = trial.pipeline(*words)
        pipeline.dit.eval()
        predictions.append(evaluate(pipeline, fixed_inputs(pipeline, trial.encoded(pipeline))))
    if found := differing(predictions[1], predictions[0]):
        raise LawBroken(
            f"with the exported modules over the base, {found}: it depends on more than its weights"
        )
    _resume(runs, folder)
    return f"{len(saved)} weights in the checkpoint"


def _resume(runs: TrainedRuns, folder: Path) -> int:
    """Resumes a finished run in its middle, and compares the end; returns the number of compared tensors."""
    losses, state = losses_of(folder), trained_state(folder / str(STEPS))
    runs.resume(folder, STEPS // 2)
    if losses_of(folder) != losses:
        raise LawBroken(
            f"resumed at step {STEPS // 2}, the losses are {losses_of(folder)}, not {losses}: something that "
            "matters is kept in Python, or drawn from a global generator; keep it in a buffer, or draw it "
            "from `sample.generator` or `random`"
        )
    if found := differing(trained_state(folder / str(STEPS)), state):
        raise LawBroken(f"resumed at step {STEPS // 2}, {found}")
    return len(state)


def losses_of(folder: Path) -> list[float]:
    """Returns the loss of each step of a run."""
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def trained_state(step: Path) -> Results:
    """Returns weights and optimizer state of a step, by parameter and kind."""
    saved = read_fragments(step, read_manifest(step))
    kinds = {kind for name in saved.shapes for kind in saved.kinds(name)} | {MASTER}
    return {
        f"{kind} of {name}": tensor.clone()
        for kind in sorted(kinds)
        for name, tensor in saved.whole(kind).items()
    }


def _replicated(step: Path, model_rank: int) -> dict[str, Tensor]:
    """Returns the weights of a rank that all ranks of the model axis should have alike."""
    module: dict[str, Tensor] = load_torch_file(step / model_file_name(model_rank))["module"]
    names = {name.removeprefix(SAT_PREFIX): tensor for name, tensor in module.items()}
    floats = {name: tensor for name, tensor in names.items() if tensor.is_floating_point()}
    return {name: tensor for name, tensor in floats.items() if tensor_parallel_layout(name) is None}


def _apart(actual: list[float], expected: list[float]) -> str:
    pairs = zip(actual, expected, strict=True)
    if len(actual) == len(expected) and all(abs(a - b) <= _SUMMED * abs(b) for a, b in pairs):
        return ""
    return f"the losses are {actual}, not {expected}"


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File")]
    return f"{lines[-1]} ({places[-1]})" if places else lines[-1]
