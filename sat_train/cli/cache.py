"""`sat-train cache`: lists, verifies and prunes a cache of encoded samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sat_train.cli.options import parse_options
from sat_train.config import load_run_config
from sat_train.config.values import COMMAND_LINE
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.key import EncoderDigests
from sat_train.encoding.cache.prune import CacheStats, Staleness, list_entries, prune_entries, verify_entries
from sat_train.errors import ConfigError, Fault, printable
from sat_train.log import configure_logging


def main(argv: Sequence[str]) -> int:
    """Lists, verifies or prunes a cache.

    Args:
        argv: The words after `sat-train cache`.

    Returns:
        0, or 1 if `verify` found damage.

    Raises:
        SatTrainError: There is no cache in the folder, or the files given with `--base` are faulty.
    """
    configure_logging()
    options, base, words = parse_options(_parser(), argv)
    if options.what == "verify":
        if base or words:
            unread = " ".join([*base, *words])
            expected = "no configuration: it reads every entry"
            raise ConfigError([Fault("verify", unread, expected, COMMAND_LINE)])
        return _verify(options.cache_dir)
    file_metadata = FileMetadata(options.cache_dir)
    staleness = Staleness(
        file_metadata,
        encoder_digests=_encoder_digests(base, words, file_metadata),
        drop_gone=options.gone,
        drop_failed=options.failed,
        asks_remote=options.remote,
    )
    if options.what == "list":
        lines, damaged = list_entries(options.cache_dir, staleness)
        _show(lines, damaged)
        return 0
    entries, size = prune_entries(options.cache_dir, staleness, drop_damaged=options.damaged)
    print(f"removed {entries} entries, {_mb(size)}")
    return 0


def _verify(cache_dir: Path) -> int:
    whole, faults = verify_entries(cache_dir)
    for fault in faults:
        print(printable(fault))
    print(f"{whole} entries are whole, {len(faults)} {'fault' if len(faults) == 1 else 'faults'}")
    return 1 if faults else 0


def _encoder_digests(
    base: Sequence[str], words: Sequence[str], file_metadata: FileMetadata
) -> EncoderDigests | None:
    """Returns the encoder digests of the configuration on the command line, if there is one."""
    if not base and not words:
        return None
    from sat_train.encoding.digests import digest_encoders  # imports torch

    return digest_encoders(load_run_config(base, words, purpose="check"), file_metadata)


def _show(lines: Sequence[CacheStats], damaged: Sequence[str]) -> None:
    table = Table("kind", "encoder", "entries", "size", "stale")
    for stats in lines:
        stale = ", ".join(f"{count} {reason}" for reason, count in stats.stale) or "-"
        encoder = escape(printable(stats.encoder)) or "-"
        table.add_row(stats.kind, encoder, str(stats.entries), _mb(stats.size), stale)
    console = Console()
    console.print(table)
    for fault in damaged:
        console.print(
            printable(f"damaged, and ignored by every reader: {fault}"), markup=False, soft_wrap=True
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train cache",
        description="list: shows entries, and which are stale. verify: reads every byte. "
        "prune: removes the entries that list calls stale; not while a run reads the cache.",
        epilog="With --base FILE ... (and overrides), entries of other encoders count as stale too.",
        usage="sat-train cache {list,verify,prune} --cache-dir DIR [--gone] [--failed] [--damaged] "
        "[--remote] [--base FILE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("list", "verify", "prune"))
    parser.add_argument("--cache-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gone", action="store_true", help="count entries whose file is gone as stale")
    parser.add_argument("--failed", action="store_true", help="count remembered failures as stale")
    parser.add_argument("--damaged", action="store_true", help="prune: also remove damaged entries")
    parser.add_argument("--remote", action="store_true", help="ask remote storage whether files have changed")
    return parser
