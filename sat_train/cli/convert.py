"""`sat-train convert`: weights of a run, of SAT or of diffusers to diffusers or SAT."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sat_train.checkpoint.convert import Conversion, convert
from sat_train.config import ModelConfig, load_run_config
from sat_train.config.run_model import find_resolved
from sat_train.log import configure_logging

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(argv: Sequence[str]) -> int:
    """Converts weights and says where they are.

    Args:
        argv: The words after `sat-train convert`.

    Raises:
        CheckpointError: The source or the destination is not usable.
        ConfigError: The files given with `--base` are faulty.
    """
    configure_logging()
    options = _parser().parse_args(argv)
    conversion = Conversion(
        source=options.source,
        dest=options.dest,
        to=options.to,
        merge_lora=options.merge_lora,
        lora=options.lora,
        lora_strength=options.lora_strength,
        load_base=options.load_base,
        ema=options.ema,
        model_size=options.model_parallel_size,
        dtype=_DTYPES.get(options.dtype),
        model=read_model_section(options.source, options.base),
    )
    with _bar() as bar:

        def progress(size: int) -> Callable[[int], None]:
            task = bar.add_task("", total=size)
            return lambda count: bar.update(task, advance=count)

        dest = convert(conversion, progress=progress)
    print(f"wrote {dest}; every value was read back and compared")
    return 0


def read_model_section(source: Path, base: Sequence[Path]) -> ModelConfig | None:
    """Returns section `model`: of the files given, else of the run that the source is, else None."""
    resolved = find_resolved(str(source))
    files = list(base) or ([resolved] if resolved else [])
    return load_run_config(files, purpose="check", check_paths=False).model if files else None


def _bar() -> Progress:
    return Progress(TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train convert",
        description="Writes weights for diffusers or SAT, reads them back and compares them. "
        "LoRA runs become a file for pipe.load_lora_weights at scale 1.0, unless --merge-lora.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a run, one step of it, a SAT folder, a diffusers folder, or a file of weights",
    )
    parser.add_argument("dest", type=Path, help="folder to make")
    parser.add_argument("--to", choices=("diffusers", "sat"), required=True)
    parser.add_argument("--merge-lora", action="store_true", help="add the adapters to the weights")
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="PATH",
        help="add the adapters of this LoRA file or folder to the weights",
    )
    parser.add_argument(
        "--lora-strength", type=_finite, default=1.0, metavar="X", help="factor on the adapters of --lora"
    )
    parser.add_argument(
        "--load-base", type=Path, metavar="PATH", help="where the base weights of a LoRA run lie now"
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights (args.ema_decay)")
    parser.add_argument(
        "--model-parallel-size", type=_positive, default=1, metavar="N", help="files to cut into (sat)"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="default: what the run computed in")
    parser.add_argument(
        "--base",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="the model's YAML, for sources that are not a run",
    )
    return parser


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
