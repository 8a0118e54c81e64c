"""`sat-train check`: reads a configuration, names every fault, summarises it; only `--build` needs torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sat_train.cli.options import MOST_GIB, MOST_GPUS, check_gpus, parse_options, positive
from sat_train.config import RunConfig, load_run_config
from sat_train.config.explain import explain_key, list_values
from sat_train.config.extensions import load_extensions
from sat_train.config.facts import ClipCounts, RunFacts
from sat_train.config.json_schema import render_json_schema
from sat_train.config.rules import warnings_of_run
from sat_train.config.summary import summarize


def main(argv: Sequence[str]) -> int:
    """Checks the configuration that a command line describes.

    Args:
        argv: The words after `sat-train check`.

    Raises:
        ConfigError: With every fault.
    """
    options, base, words = parse_options(_parser(), argv)
    if options.schema:
        load_extensions(words)
        print(render_json_schema(), end="")
        return 0
    if options.explain and not base and not words:
        print(explain_key(options.explain, None))
        return 0
    config = load_run_config(base, words, purpose="check", check_paths=not options.no_paths)
    check_gpus("--ranks", options.ranks, config)
    for note in config.notes:
        print(note)
    if options.explain:
        print(explain_key(options.explain, config))
    elif options.build:
        from sat_train.cli.build_report import report_build  # imports torch

        print(report_build(config))
    else:
        print(list_values(config, with_defaults=options.all))
        print(f"\n{_sum_up(config, options)}")
    return 0


def _sum_up(config: RunConfig, options: argparse.Namespace) -> str:
    """Returns the summary, the warnings of the guard rails that need facts, and the verdict.

    Raises:
        DataError: The data cannot be read.
    """
    ranks: int | None = options.ranks and options.ranks // config.args.model_parallel_size
    clips = None if options.no_paths else _count_clips(config)
    facts = RunFacts(clips=clips, data_ranks=ranks, card_gib=options.card)
    summary = "\n".join([summarize(config, facts), *warnings_of_run(config, facts)])
    verdict = f"incomplete: {config.needs}" if config.needs else "ready: this configuration has no fault"
    return f"{summary}\n\n{verdict}"


def _count_clips(config: RunConfig) -> ClipCounts | None:
    """Counts the clips of local sources; remote ones are read only when a run starts."""
    args = config.args
    paths = [*(args.train_data or ()), *(args.valid_data or ())]
    if config.data is None or not args.train_data or any("://" in path for path in paths):
        return None
    from sat_train.data.sources.read import (
        build_source_options,
        count_clips,  # imports PyAV
    )

    options = build_source_options(config.data)
    return count_clips(args.train_data, args.valid_data, shares=config.data_shares(), options=options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train check",
        description="Reads a configuration as training would; names every fault, or shows the settings and a "
        "summary.",
        usage="sat-train check --base FILE [FILE ...] [key.path=value ...] [--flag value ...] "
        "[--extension NAME ...] [--all | --explain KEY | --build | --schema] [--no-paths] [--ranks N] "
        "[--card GIB]",
        allow_abbrev=False,
    )
    parser.add_argument("--all", action="store_true", help="show defaults and the model's numbers too")
    parser.add_argument(
        "--explain", metavar="KEY", help="describe one key: its meaning, allowed values and value"
    )
    parser.add_argument(
        "--build", action="store_true", help="build the model without memory, and count parameters"
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of configs/schema.json")
    parser.add_argument("--no-paths", action="store_true", help="do not check that data and weights exist")
    gpus, gib = positive(int, MOST_GPUS), positive(float, MOST_GIB)
    parser.add_argument("--ranks", type=gpus, metavar="N", help="GPUs of the run, for its batch")
    parser.add_argument("--card", type=gib, metavar="GIB", help="memory of one of them, in GiB")
    return parser
