"""Measures reading: videos compared with other readers, cached encodings, and the memory of a worker.

    python benchmarks/data.py                                        # all five, small: about three minutes
    python benchmarks/data.py decode --samples 8 --preset medium     # 720p and 1080p; decord if there
    python benchmarks/data.py decode --clip my_clip.mp4              # 30 frames a second
    python benchmarks/data.py cache --samples 200
    python benchmarks/data.py write --samples 40
    python benchmarks/data.py memory --samples 10000
    python benchmarks/data.py resize

`decode` takes 49 frames at 8 a second, 480x720, from random windows of H.264 clips of 30 frames a second. All
ways run in turn, sample by sample, in one process with one thread each; what counts is the CPU time of the
process, all its threads included, from opening the file to the scaled frames:

    ours         seek, decode what is needed, scale and convert only the frames that are used
    span         PyAV: decode the whole span, turn all of it into RGB, scale what is used
    decord       the same with decord, as CogVideo does
    decord_used  decord, asked only for the frames that are used
    decord_open  of that, opening the file: decord reads the index of all of it
    floor        seek and decode the whole span, and nothing else
    needed       seek and decode what the used frames refer to, and nothing else

CogVideo takes frame floor(first + 183 i / 49), ours the one nearest in time to first + 3.75 i.

`cache` reads encodings of CogVideoX-5B's size through the loader: in this process, and with workers that are
ahead of steps of 50 ms. `write` adds encodings of that size to a cache while a device, which is a pause here,
encodes the next: a device waits for the time beyond its own. `memory` follows the loader's own worker over
samples of the shipped clips. `resize` compares FFmpeg's and torchvision's scaling of one frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data_parts import cache, decode, memory, resize, write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("all", "decode", "cache", "write", "memory", "resize"), default="all"
    )
    parser.add_argument("--samples", type=int, help="windows, batches or samples")
    parser.add_argument("--heights", type=int, nargs="+", choices=(720, 1080), help="of the drawn clips")
    parser.add_argument("--preset", default="veryfast", help="of x264")
    parser.add_argument("--clip", type=Path, help="decode this one instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = options.what == "all"
    if options.what in ("all", "decode"):
        heights = options.heights or ([720] if small else [720, 1080])
        decode.run(options.samples or (2 if small else 8), heights, options.preset, options.clip)
    if options.what in ("all", "cache"):
        cache.run(options.samples or (20 if small else 200))
    if options.what in ("all", "write"):
        write.run(options.samples or (10 if small else 40))
    if options.what in ("all", "resize"):
        resize.run(options.samples or 20)
    if options.what in ("all", "memory"):
        memory.run(options.samples or (1000 if small else 10_000))


if __name__ == "__main__":
    main()
