"""Runs the whole corpus and prints one line for each case that broke a law, then the counts.

python -m tests.hostile                 # all
python -m tests.hostile yaml: weights:  # those whose names begin so
python -m tests.hostile --every 20      # each twentieth
python -m tests.hostile --seconds 90    # on a machine that is busy with other things
python -m tests.hostile --show          # with the last words of each, good or bad
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.hostile.corpus import corpus
from tests.hostile.guard import MAX_SECONDS, Guard

_SHOWN = 300  # characters of what a case printed last


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("beginnings", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=MAX_SECONDS)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args(words)
    beginnings = tuple(options.beginnings)
    cases = [case for case in corpus() if not beginnings or case.name.startswith(beginnings)]
    chosen = cases[:: options.every]
    counts, broken, slowest, largest = Counter[str](), 0, 0.0, 0
    with tempfile.TemporaryDirectory() as root:
        guard = Guard(Path(root), seconds=options.seconds)
        for case in chosen:
            outcome = guard.run(case)
            counts[case.name.partition(":")[0]] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.bytes)
            broken += bool(outcome.problems)
            if outcome.problems or options.show:
                lines = outcome.problems or (f"good, {outcome.seconds:.1f} s",)
                last = outcome.output.strip()[-_SHOWN:]
                print(f"{case.name}: {'; '.join(lines)} | {last!r}", flush=True)
    for family, count in sorted(counts.items()):
        print(f"{family:<12}{count:>6} cases")
    print(f"{len(chosen)} cases, {broken} broke a law")
    print(f"slowest {slowest:.1f} s, most memory {largest / 1e6:.0f} MB")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
