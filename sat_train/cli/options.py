"""Options of commands that also take a configuration: what a command does not know is the configuration's."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence

from sat_train.config import RunConfig, split_command_line
from sat_train.config.schema.args import ArgsConfig
from sat_train.config.values import COMMAND_LINE
from sat_train.errors import ConfigError, Fault

_NEAR = 0.75
MOST_GPUS = 100_000
MOST_GIB = 10_000  # of one GPU: a figure in MiB is not one in GiB


def parse_options(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Separates a command's own options from the configuration's files and words.

    Args:
        parser: Of the command.
        argv: The words after the command's name.

    Returns:
        The options, the files after `--base`, and the other words.

    Raises:
        ConfigError: A flag is neither a setting nor an option, but nearly one.
    """
    options, rest = parser.parse_known_args(argv)
    flags = sorted(parser._option_string_actions)
    faults = []
    for word in rest:
        flag = word.partition("=")[0]
        is_setting = flag.removeprefix("--").replace("-", "_") in ArgsConfig.model_fields
        if flag.startswith("--") and not is_setting and flag not in flags:
            near = difflib.get_close_matches(flag, flags, n=1, cutoff=_NEAR)
            faults += [Fault(flag, "", f"an option of {parser.prog}", COMMAND_LINE, each) for each in near]
    if faults:
        raise ConfigError(faults)
    return options, *split_command_line(rest)


def positive(kind: type[int] | type[float], most: float) -> Callable[[str], float]:
    """Returns argparse's reader of a number above 0.

    Args:
        kind: Whether it is a whole number.
        most: The largest that makes sense.
    """
    words = "a whole number" if kind is int else "a number"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value <= most or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {words} above 0, at most {most:,}")
        return value

    return read


def check_gpus(flag: str, count: int | None, config: RunConfig) -> None:
    """Raises where the ranks that share a model do not divide a number of GPUs.

    Args:
        flag: The option that gives the number.
        count: The number; None: it was not given.
        config: The configuration.

    Raises:
        ConfigError: They do not.
    """
    size = config.args.model_parallel_size
    if count is not None and count % size:
        expected = f"a multiple of args.model_parallel_size = {size}"
        raise ConfigError([Fault(flag, str(count), expected, COMMAND_LINE)])
