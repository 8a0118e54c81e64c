"""`sat-train check`: reads a configuration, names every fault, shows every value; torch for `--build`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sat_train.config import load_run_config, split_command_line
from sat_train.config.explain import explain_key, list_values
from sat_train.config.json_schema import render_json_schema


def main(argv: Sequence[str]) -> int:
    """Checks the configuration that a command line describes.

    Args:
        argv: The words after `sat-train check`.

    Raises:
        ConfigError: With every fault.
    """
    options, rest = _parser().parse_known_args(argv)
    base, words = split_command_line(rest)
    if options.schema:
        print(render_json_schema(), end="")
        return 0
    if options.explain and not base and not words:
        print(explain_key(options.explain, None))
        return 0
    run = load_run_config(base, words, purpose="check", check_paths=not options.no_paths)
    for note in run.notes:
        print(note)
    if options.explain:
        print(explain_key(options.explain, run))
    elif options.build:
        from sat_train.cli.build_report import report_build  # imports torch

        print(report_build(run))
    else:
        print(list_values(run))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train check",
        description="Reads a configuration as training would; names every fault, or shows every value.",
        usage="sat-train check --base FILE [FILE ...] [key.path=value ...] [--flag value ...] "
        "[--explain KEY | --build | --schema] [--no-paths]",
        allow_abbrev=False,
    )
    parser.add_argument("--explain", metavar="KEY", help="what one key does, may hold and holds")
    parser.add_argument("--build", action="store_true", help="build without memory, count parameters")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of configs/schema.json")
    parser.add_argument("--no-paths", action="store_true", help="do not check that data and weights exist")
    return parser
