"""An epoch over damaged and odd files: no crash, no hang, and every clip is shown or named, never both."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest

from sat_train.cli.main import main
from sat_train.config.shapes import ClipShape
from sat_train.data.buckets import SampleSpec
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.inspect import inspect_clips
from sat_train.data.prepass import chunk_records, look_into
from sat_train.data.sampler import ClipRef
from sat_train.data.sources.read import read_source
from tests.unit.data.corpus import ANY, GOOD, NUM_FRAMES, RATE, make_corpus, make_pipe
from tests.unit.data.test_loader import make_dataset, make_loader, take
from tests.unit.data.videos import SIDE, numbers_of, record_of

FPS, WANTED_FRAMES = 8, 5
FILES = Path(__file__).parent / "files"
TIMEOUT_S = 120  # for one clip; nothing here needs it
SPEC = SampleSpec((ClipShape(WANTED_FRAMES, SIDE, SIDE),), FPS, max_upscale=1)
CAUSES = {"missing", "unreadable", "no video", "truncated", "damaged", "no times", "short", "too small"}
CAUSES |= {"too large"}  # docs/data.md; no clip here may take too long or end its worker
AT_ONCE = {"missing", "unreadable", "no video", "too large"}  # seen whichever frame is asked for

pytestmark = pytest.mark.timeout(600, method="thread")  # a decoder that hangs hears no signal


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with what is to become of each of its clips."""
    root = tmp_path_factory.mktemp("corpus") / "set"
    return root, {f"videos/{name}": label for name, label in make_corpus(root).items()}


@pytest.fixture(scope="module")
def records(corpus, tmp_path_factory):
    """All clips of the folder, and a pipe."""
    pipe = tmp_path_factory.mktemp("pipe") / "set"
    make_pipe(pipe)
    return [*read_source(corpus[0]).records, *read_source(pipe).records]


@pytest.fixture(scope="module")
def epochs(records, tmp_path_factory):
    """What one epoch shows of each clip and why it refuses others, for several numbers of workers."""
    return {
        workers: read_epoch(records, workers, tmp_path_factory.mktemp("run") / "quarantine.jsonl")
        for workers in (0, 2)
    }


def read_epoch(records, workers, path):
    """Returns numbers of the frames shown, by clip; causes of those refused; the lines of the log file."""
    dataset = make_dataset(
        records,
        max_num_frames=WANTED_FRAMES,
        window="center",  # the same whether a clip is shown in its own turn or for another one
        short_clip="skip",
        max_upscale=1,
        timeout_s=TIMEOUT_S,
    )
    loader = make_loader(
        dataset, batch_size=1, allowed=1.0, path=path, num_workers=workers, worker_timeout_s=TIMEOUT_S
    )
    clips = {}
    for batch in take(loader, len(records)):
        clips.setdefault(batch.clip_ids[0], numbers_of(batch.samples[0].video_tchw))
    causes = {clip: failure.cause for clip, failure in loader.failures.by_clip.items()}
    return clips, causes, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_clip_is_shown_or_refused_by_name_and_never_both(records, epochs, workers):
    clips, causes, _ = epochs[workers]
    assert len(records) > 190
    assert clips.keys() | causes.keys() == {record.clip_id for record in records}
    assert not clips.keys() & causes.keys()
    assert len(clips) + len(causes) == len(records)
    assert set(causes.values()) <= CAUSES


def test_each_clip_ends_as_it_must(corpus, epochs):
    """Good ones are shown, bad ones are refused for the right reason."""
    clips, causes, _ = epochs[0]
    verdicts = {clip: causes.get(clip, GOOD) for clip in corpus[1]}
    wrong = {
        clip: (verdicts[clip], label)
        for clip, label in corpus[1].items()
        if label != ANY and verdicts[clip] not in label.split(", ")
    }
    assert not wrong
    assert causes["videos/pipe.mp4"] == "unreadable"
    assert {"videos/folder.mp4", "videos/notes.md"}.isdisjoint(clips.keys() | causes.keys())


def test_the_number_of_workers_changes_nothing(epochs):
    assert epochs[0][:2] == epochs[2][:2]


def test_the_log_file_holds_the_refused_clips_each_once(epochs):
    for _, causes, lines in epochs.values():
        assert len(lines) == len(causes)
        assert {line["clip_id"]: line["cause"] for line in lines} == causes


def test_what_is_left_of_a_cut_file_is_shown_at_its_pace(epochs):
    """A file that lost its end may be taken for a short one, but never for another film."""
    clips, _, _ = epochs[0]
    kept = {
        clip: numbers for clip, numbers in clips.items() if clip.startswith(("videos/cut/", "videos/good/"))
    }
    assert any(clip.startswith("videos/cut/") for clip in kept)
    for clip, numbers in kept.items():
        late = [number / RATE - i / FPS for i, number in enumerate(numbers)]
        assert max(late) - min(late) <= 1 / RATE + 1e-6, (clip, numbers)
        assert max(numbers) < NUM_FRAMES, (clip, numbers)


@pytest.mark.parametrize("processes", [1, 4])
def test_inspect_names_what_training_would_refuse(corpus, epochs, processes):
    records = read_source(corpus[0]).records
    facts = inspect_clips(records, SPEC, num_processes=processes, timeout_s=TIMEOUT_S)
    problems = {fact.record.clip_id: fact.problem.cause for fact in facts if fact.problem is not None}
    assert [fact.record.clip_id for fact in facts] == [record.clip_id for record in records]
    assert len(facts) == len(corpus[1])
    assert set(problems.values()) <= CAUSES
    _, causes, _ = epochs[0]
    certain = {clip: cause for clip, cause in causes.items() if cause in AT_ONCE and clip in corpus[1]}
    assert certain.items() <= problems.items()
    assert not {clip for clip in problems if corpus[1][clip] == GOOD}


def windows_of(record, info):
    """Returns the windows of a clip as `window: chunks` cuts them, each from its part's begin."""
    return make_dataset(
        chunk_records(record, info, SPEC, WANTED_FRAMES),
        max_num_frames=WANTED_FRAMES,
        window="head",
        max_upscale=1,
        timeout_s=TIMEOUT_S,
    )


def problem_in_training(record) -> tuple[int, str | None]:
    """Returns the windows of a clip, and the first cause for which training refuses it or one of them."""
    try:
        info = look_into(record, with_turn=True)
        SPEC.bucket(info, record)
        dataset = windows_of(record, info)
        for clip in range(len(dataset)):
            dataset.sample(0, ClipRef(0, clip, 0))
    except BadClip as error:
        return 0, error.cause
    return len(dataset), None


def test_inspect_counts_the_windows_that_training_reads_and_no_others(corpus, tmp_path):
    """For every file and every window: packed B-frames and a recording that begins amid a group too."""
    others = [record_of(path) for path in sorted(FILES.iterdir())]
    cut = tmp_path / "recording.ts"
    cut.write_bytes((corpus[0] / "videos" / "whole" / "a.ts").read_bytes()[188 * 12 :])
    records = [*read_source(corpus[0]).records, *others, record_of(cut)]
    costly = ("videos/jump.mkv", "videos/8k.mp4", *(f"videos/good/{i:02d}.mp4" for i in range(2, 30)))
    records = [record for record in records if record.clip_id not in costly]
    facts = inspect_clips(records, SPEC, num_processes=2, max_windows=None, timeout_s=TIMEOUT_S)
    verdicts = {fact.record.clip_id: (fact.windows, fact.problem and fact.problem.cause) for fact in facts}
    trained = {record.clip_id: problem_in_training(record) for record in records}
    wrong = {
        clip: (verdicts[clip], trained[clip])
        for clip in verdicts
        if verdicts[clip][0] != trained[clip][0] or (verdicts[clip][1] is None) != (trained[clip][1] is None)
    }
    assert not wrong
    assert verdicts["xvid_packed.avi"] == (4, None)
    assert verdicts["recording.ts"][1] is None
    assert all(fact.decoded == fact.windows for fact in facts if fact.problem is None)


def test_the_inspect_command_counts_and_names_them_all(corpus, tmp_path, capsys):
    words = [f"data.params.video_size=[{SIDE},{SIDE}]", f"data.params.max_num_frames={WANTED_FRAMES}"]
    words += [f"data.params.fps={FPS}", "data.params.max_upscale=1", "data.params.short_clip=skip"]
    words += [f"args.train_data=[{corpus[0]}]", "--output", str(tmp_path)]
    assert main(["data", "inspect", *words]) == 0
    said = capsys.readouterr().out
    total, usable = map(int, re.search(r"clips +(\d+), of which (\d+) usable", said).groups())
    names = "|".join(CAUSES)
    refused = sum(int(count) for _, count in re.findall(rf"^({names}) +(\d+):", said, re.MULTILINE))
    assert total == len(corpus[1]) == usable + refused
    page = (tmp_path / "index.html").read_text()
    assert not [clip for clip in corpus[1] if clip not in page]


def test_inspect_does_not_wait_for_a_pipe(tmp_path):
    pipe = make_pipe(tmp_path / "set")
    records = read_source(tmp_path / "set").records
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.extend(inspect_clips(records, SPEC, num_processes=1)), daemon=True
    )
    thread.start()
    thread.join(5)
    waits = thread.is_alive()
    if waits:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets it go
        thread.join(5)
    assert not waits
    assert [fact.problem.cause for fact in verdicts] == ["unreadable"]
