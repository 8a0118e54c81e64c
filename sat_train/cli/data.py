"""`sat-train data inspect | preview`: reports on a data set, or writes samples as the model sees them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sat_train.cli.options import parse_options
from sat_train.config import RunConfig, load_run_config
from sat_train.data.buckets import SampleSpec
from sat_train.data.build import build_field_readers, build_sample_spec, build_train_loader
from sat_train.data.fields.reader import FieldReader
from sat_train.data.inspect import MAX_WINDOWS, SetReport, inspect_clips
from sat_train.data.preview import join_videos, show_sample
from sat_train.data.report import render_page
from sat_train.data.sources.read import build_source_options, read_source
from sat_train.data.sources.records import ClipSource
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError, DataError, printable
from sat_train.files import write_text
from sat_train.log import configure_logging
from sat_train.models.text.tokenizer import count_tokens
from sat_train.sampling.video_file import write_contact_sheet, write_mp4


def main(argv: Sequence[str]) -> int:
    """Inspects or previews the data of a configuration.

    Args:
        argv: The words after `sat-train data`.

    Raises:
        SatTrainError: The configuration or the data are faulty.
    """
    options, base, words = parse_options(_parser(), argv)
    config = load_run_config(base, words, purpose="check", check_paths=False)
    configure_logging()
    if not config.args.train_data:
        raise DataError(
            "args.train_data is not set", remedy="--base configs/sft.yaml args.train_data=[my_clips]"
        )
    if options.what == "inspect":
        return _inspect(config, options.output, options.processes, options.windows or None)
    return _preview(config, options.output, options.count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-train data",
        description="inspect: reads the set once; reports numbers and bad files, with a page of thumbnails. "
        "preview: writes the first samples of training exactly as the model will see them.",
        usage="sat-train data {inspect,preview} --base FILE [...] [key.path=value ...] [--output FOLDER]",
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("inspect", "preview"))
    parser.add_argument("--output", type=Path, default=Path("data_report"), help="output folder")
    parser.add_argument("--count", type=_at_least(1), default=8, help="preview: samples to write")
    parser.add_argument(
        "--windows",
        type=_at_least(0),
        default=MAX_WINDOWS,
        help="inspect: windows to decode per clip, spread over it; 0: all",
    )
    parser.add_argument(
        "--processes",
        type=_at_least(1),
        default=os.cpu_count() or 1,
        help="inspect: clips to read in parallel",
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        value = int(word) if word.isdecimal() and len(word) < 10 else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least {least}")
        return value

    return number


def _inspect(config: RunConfig, output: Path, num_processes: int, max_windows: int | None) -> int:
    spec, readers = build_sample_spec(config), build_field_readers(config)
    reports = []
    for path in dict.fromkeys((*(config.args.train_data or ()), *(config.args.valid_data or ()))):
        source = read_source(path, build_source_options(config.require_data()))
        report = _report(config, source, spec, readers, num_processes, max_windows)
        reports.append(report)
        _show("".join(f"{name:<13} {value}\n" for name, value in report.lines()))
    page = output / "index.html"
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(page, render_page(reports))
    except OSError as error:
        raise DataError(f"{page} cannot be written: {error.strerror}", remedy="--output ...") from error
    _show(f"wrote {page}")
    return 0


def _show(text: str) -> None:
    print(printable(text))


def _report(
    config: RunConfig,
    source: ClipSource,
    spec: SampleSpec,
    readers: Mapping[str, FieldReader],
    num_processes: int,
    max_windows: int | None,
) -> SetReport:
    columns = (TextColumn("inspecting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(source))
        clips = inspect_clips(
            source.records,
            spec,
            readers,
            num_processes=num_processes,
            max_windows=max_windows,
            timeout_s=config.require_data().worker_timeout_s,
            on_clip=lambda: progress.advance(task),
        )
    text = config.spec.text
    long_captions = _long_captions(source, Path(text.model_dir), text.max_length)
    return SetReport(
        source.name,
        source.fingerprint,
        source.ignored,
        spec,
        tuple(clips),
        long_captions,
        text.max_length,
        (*source.notes, *([source.left_out()] if source.faults else [])),
        text.model_dir,
        {name: reader.params.kind for name, reader in readers.items()},
    )


def _long_captions(source: ClipSource, folder: Path, max_length: int) -> tuple[tuple[str, int], ...] | None:
    """Returns the captions that the text encoder truncates, with their tokens; None without a tokenizer."""
    captions = sorted({caption for record in source.records for caption in record.captions})
    try:
        counts = count_tokens(folder, captions)
    except CheckpointError:
        return None
    counted = zip(captions, counts, strict=True)
    return tuple((caption, tokens) for caption, tokens in counted if tokens > max_length)


def _preview(config: RunConfig, output: Path, count: int) -> int:
    loader = build_train_loader(config, start_single_process())
    samples = [loader.dataset[index].sample for index in range(count)]
    shown = [show_sample(sample, loader.dataset.fields) for sample in samples]
    for sample, videos in zip(samples, shown, strict=True):
        path, video = output / f"{sample.sample_index:04d}.mp4", sample.video_tchw
        write_mp4(path, join_videos([each for _, each in videos]), fps=config.require_data().params.fps)
        times = f"{sample.times[0]:.2f} to {sample.times[-1]:.2f} s"
        shape = "x".join(str(side) for side in (len(video), *video.shape[-2:]))
        _show(f"{path}  {shape}  {sample.clip_id}  {times}  {sample.caption}")
    rows = [row for videos in shown for row in videos]
    write_contact_sheet(
        output / "contact_sheet.png", [video for _, video in rows], [title for title, _ in rows]
    )
    _show(f"wrote {output / 'contact_sheet.png'}")
    return 0
