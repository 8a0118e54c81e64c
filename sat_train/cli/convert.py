"""`sat-train convert`: converts weights of a run, of SAT or of diffusers to those formats or to modules."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sat_train.cli.diffusers_snippet import diffusers_snippet
from sat_train.config import RunConfig, load_run_config
from sat_train.config.extensions import load_extensions
from sat_train.config.layers import EMBEDDED
from sat_train.config.run_model import check_recorded_extensions, find_resolved
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError, printable
from sat_train.interchange.conversion import LORA_FILE_STEM, Conversion, convert
from sat_train.interchange.sources import find_weights
from sat_train.log import configure_logging, get_logger
from sat_train.weights.names import DTYPES

log = get_logger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Converts weights and prints where they are.

    Args:
        argv: The words after `sat-train convert`.

    Raises:
        CheckpointError: The source or the destination is not usable.
        ConfigError: The files given with `--base` are faulty.
    """
    configure_logging()
    options = _parser().parse_args(argv)
    start_single_process()  # before DeepSpeed, whose files are read, looks for an accelerator
    find_weights(options.source)  # reports a missing source before anything near it is read
    needs_model = options.to != "sat" or options.base
    words = [word for name in options.extension for word in ("--extension", name)]
    words += ["--accept-changed-extension"] * options.accept_changed_extension
    check_recorded_extensions(load_extensions(words)[0], [], find_resolved(str(options.source)))
    config = read_run(options.source, options.base, words) if needs_model else None
    if config is not None and options.to == "diffusers":
        check_stock_inputs(config)
    conversion = Conversion(
        source=options.source,
        dest=options.dest,
        to=options.to,
        merge_lora=options.merge_lora,
        strength=options.strength,
        lora=tuple(options.lora),
        lora_strength=tuple(options.lora_strength),
        lora_rank=options.lora_rank,
        load_base=options.load_base,
        ema=options.ema,
        model_size=options.model_parallel_size,
        dtype=DTYPES.get(options.dtype),
        model=None if config is None else config.spec,
        extensions={} if config is None else config.extensions.tree(),
        modules=tuple(options.module),
        without_modules=options.without_modules,
    )
    try:
        with _signals_raise():
            dest = _convert(conversion)
    except _Ended as ended:
        print(
            f"ended by {ended}: {options.dest} was not written, and nothing is left behind", file=sys.stderr
        )
        return ended.exit_code
    print(printable(f"wrote {dest}; every value was read back and compared"))
    if config is not None and options.to == "diffusers":
        is_lora = (dest / f"{LORA_FILE_STEM}.safetensors").is_file()
        print(f"\nfor diffusers:\n\n{diffusers_snippet(config, dest, is_lora=is_lora)}")
    return 0


def read_run(source: Path, base: Sequence[Path], words: Sequence[str] = ()) -> RunConfig | None:
    """Returns the configuration of the model: from the given files, else the run's own, else None.

    Args:
        source: What is converted.
        base: YAML files that say which model it is.
        words: Extensions, as a command line names them.

    Raises:
        CheckpointError: The run's own configuration describes no model.
        ConfigError: It is faulty, or the run was made with an extension that is not among the words.
    """
    if base:
        return load_run_config(base, words, purpose="check", check_paths=False)
    resolved = find_resolved(str(source))
    if resolved is None:
        return None
    config = load_run_config([resolved], words, purpose="check", check_paths=False)
    if config.sources["model.network_config.params.hidden_size"] == EMBEDDED:
        raise CheckpointError(
            f"{resolved} describes no model",
            expected="a section model, as runs write it",
            remedy="name the model's preset, e.g. --base configs/model/cogvideox_5b.yaml",
        )
    return config


def check_stock_inputs(config: RunConfig) -> None:
    """Checks that diffusers' pipelines give a model all channels that it reads.

    Raises:
        CheckpointError: Conditions append channels, which no pipeline gives; they are named.
    """
    conditions = config.model.conditions.items()
    wide = [name for name, choice in conditions if choice.params.channels(config.spec)]
    if wide:
        raise CheckpointError(
            f"the conditions {', '.join(wide)} append channels to the latent, which no pipeline of diffusers "
            "gives",
            expected="a model that reads the latent, and of image-to-video the first frame next to it",
            remedy="--to sat writes all weights, --to modules what was trained next to a frozen base",
        )
    if own := ", ".join(name for name, _ in conditions):
        log.warning("diffusers' pipelines know nothing of the conditions %s: give these inputs yourself", own)


def _convert(conversion: Conversion) -> Path:
    with _bar() as bar:

        def progress(size: int) -> Callable[[int], None]:
            task = bar.add_task("", total=size)
            return lambda count: bar.update(task, advance=count)

        return convert(conversion, progress=progress)


class _Ended(KeyboardInterrupt):
    """A signal that unwinds a conversion; not an `Exception`, so that no library handles it as its own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM unwind the conversion, so that nothing half-written is left."""

    def stop(number: int, frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar() -> Progress:
    return Progress(TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train convert",
        description="Writes weights for diffusers or SAT, reads them back and compares them. "
        "LoRA runs become a file for pipe.load_lora_weights at scale 1.0, unless --merge-lora; network "
        "modules a file for args.load_modules (modules), or a control branch one for "
        "TheDenk/cogvideox-controlnet (controlnet).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a run, one step of it, a SAT folder, a diffusers folder, or a file of weights",
    )
    parser.add_argument("dest", type=Path, help="folder to create")
    parser.add_argument("--to", choices=("diffusers", "sat", "modules", "controlnet"), required=True)
    parser.add_argument(
        "--module",
        nargs="+",
        default=(),
        metavar="NAME",
        help="modules to write (modules, controlnet); default: everything that the run trained or added. Of "
        "a folder of TheDenk/cogvideox-controlnet: the name its branch gets; default: branch",
    )
    parser.add_argument(
        "--without-modules", action="store_true", help="leave out what diffusers does not have (diffusers)"
    )
    _add_adapter_words(parser)
    parser.add_argument(
        "--load-base", type=Path, metavar="PATH", help="present place of a LoRA run's base weights"
    )
    parser.add_argument(
        "--ema", action="store_true", help="export the average of the weights (args.ema_decay)"
    )
    parser.add_argument(
        "--model-parallel-size",
        type=_positive,
        default=1,
        metavar="N",
        help="number of model-parallel files (sat)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the precision of the run")
    parser.add_argument(
        "--base",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="the model's YAML, for sources that are not a run",
    )
    parser.add_argument(
        "--extension", action="append", default=[], metavar="NAME", help="what the run was made with"
    )
    parser.add_argument("--accept-changed-extension", action="store_true", help="although its files differ")
    return parser


def _add_adapter_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--merge-lora", action="store_true", help="add the adapters to the weights")
    parser.add_argument(
        "--lora",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="add the adapters of these LoRA files or folders: to those of the source, which are written "
        "as one file, or to the weights, if the source has none or with --merge-lora",
    )
    parser.add_argument(
        "--lora-strength",
        type=_finite,
        nargs="+",
        default=(1.0,),
        metavar="X",
        help="factor on the adapters of --lora: one for each, or one for all",
    )
    parser.add_argument(
        "--strength", type=_finite, default=1.0, metavar="X", help="factor on the adapters of the source"
    )
    parser.add_argument(
        "--lora-rank",
        type=_positive,
        metavar="R",
        help="truncate adapters that are written as a file to this rank (default: their exact sum)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError("must be a finite number")
    return number
