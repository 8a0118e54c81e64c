"""What `sat-train data` says about a set."""

from __future__ import annotations

import shutil

import av
import pytest

from sat_train.cli.main import main
from sat_train.config.shapes import ClipShape
from sat_train.data.buckets import SampleSpec
from sat_train.data.inspect import SetReport, inspect_clips
from sat_train.data.report import render_page
from sat_train.data.sources.read import read_source
from tests.unit.data.videos import make_folder, write_numbered

SPEC = SampleSpec((ClipShape(9, 32, 32),), fps=8, max_upscale=1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips of one content and its copy, a long, a short, a small and a broken one, another file."""
    root = make_folder(tmp_path_factory.mktemp("data") / "set", "abcd", num_frames=60, rate=30)
    make_folder(root, ["short"], num_frames=20, rate=25)
    make_folder(root, ["small"], num_frames=60, rate=30, side=16)
    make_folder(root, ["broken", "twin"], num_frames=2)
    write_numbered(root / "videos" / "d.mp4", num_frames=120, rate=30)
    shutil.copy(root / "videos" / "a.mp4", root / "videos" / "twin.mp4")
    (root / "videos" / "broken.mp4").write_bytes(b"x" * 1000)
    (root / "videos" / "<b>.md").write_text("x")
    (root / "labels" / "a.txt").write_text("<script> & more")
    return root


@pytest.fixture(scope="module")
def report(folder):
    source = read_source(folder)
    seen = []
    clips = inspect_clips(source.records, SPEC, num_processes=2, on_clip=lambda: seen.append(1))
    assert len(seen) == len(source) == 8
    return SetReport(source.name, source.fingerprint, source.ignored, SPEC, tuple(clips), (), 32)


def test_every_clip_is_counted_once(report):
    result = {cause: [clip.record.clip_id for clip in clips] for cause, clips in report.problems().items()}
    assert result == {
        "unreadable": ["videos/broken.mp4"],
        "short": ["videos/short.mp4"],
        "too small": ["videos/small.mp4"],
    }
    assert [[clip.record.clip_id for clip in group] for group in report.duplicates()] == [
        ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4", "videos/twin.mp4"]
    ]
    message = dict(report.lines())
    assert message["clips"] == "8, of which 5 usable"
    assert message["length"].startswith("15s in all; 0.8 to 4s, median 2 each")
    assert message["windows"] == "7 of a sample's length that share no frame; 7 were decoded"
    assert message["  9x32x32"] == "5 clips"
    assert message["rates"] == "30 (6), 25 (1)"
    assert message["sizes"] == "32x32 (6), 16x16 (1)"
    assert message["short"] == "1: videos/short.mp4"
    assert message["not clips"] == "1 .md"


def test_the_page_is_self_contained_and_escapes_what_it_shows(report):
    page = render_page([report])
    assert page.count("<figure") == 8
    assert page.count("data:image/jpeg;base64,") == 7
    assert "&lt;script&gt; &amp; more" in page
    assert "<script>" not in page
    assert "http" not in page
    assert page.index("broken.mp4</figcaption>") < page.index("a.mp4</figcaption>")


def words(folder, *more):
    fixed = ["data.params.video_size=[32,32]", "data.params.max_num_frames=9", "data.params.fps=8"]
    fixed += ["args.num_workers=0", "data.max_bad_fraction=1", f"args.train_data=[{folder}]"]
    return [*fixed, "data.params.max_upscale=1.5", "data.params.short_clip=skip", *more]


def test_names_and_captions_do_not_steer_the_terminal(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd/videos/broken.mp4").rename(tmp_path / "odd/videos/\x1b]0;broken\x07.mp4")
    (tmp_path / "odd/labels/broken.txt").rename(tmp_path / "odd/labels/\x1b]0;broken\x07.txt")
    (tmp_path / "odd/labels/\x1b]0;broken\x07.txt").write_text("a \x1b[31mred ball")
    assert main(["data", "inspect", *words(tmp_path / "odd", f"--output={tmp_path / 'report'}")]) == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    message = "".join(capsys.readouterr())
    assert "\x1b]0" not in message
    assert "\x1b" not in page
    assert r"\x1b]0;broken\x07.mp4" in message
    assert r"a \x1b[31mred ball" in page


def test_inspect_writes_a_page(folder, tmp_path, capsys):
    assert main(["data", "inspect", *words(folder), "--output", str(tmp_path / "report")]) == 0
    assert "8, of which 5 usable" in capsys.readouterr().out
    assert "broken.mp4" in (tmp_path / "report" / "index.html").read_text()


def test_preview_writes_what_the_model_will_see(folder, tmp_path, capsys):
    assert main(["data", "preview", *words(folder), "--output", str(tmp_path), "--count", "3"]) == 0
    said = capsys.readouterr().out
    assert said.count(".mp4  9x32x32  set/videos/") == 3
    for number in range(3):
        with av.open(str(tmp_path / f"{number:04d}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width, stream.average_rate, stream.frames) == (32, 32, 8, 9)
    assert (tmp_path / "contact_sheet.png").is_file()


def test_without_data_it_says_what_to_type(capsys):
    assert main(["data", "inspect", "args.train_data=null"]) == 2
    assert "args.train_data" in capsys.readouterr().err


def test_the_page_replaces_a_link_and_leaves_what_it_points_at(folder, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").symlink_to(tmp_path / "victim")
    assert main(["data", "inspect", *words(folder), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "victim").read_text() == "mine"
    assert "<html>" in (tmp_path / "report" / "index.html").read_text()


def test_nothing_shown_steers_a_terminal(tmp_path, capsys):
    root = make_folder(tmp_path / "set", ["a\x1b[31mred"], num_frames=60)
    (root / "labels" / "a\x1b[31mred.txt").write_text("clear\x1b[2J the screen")
    (root / "videos" / "a\x1b[31mred.mp4").write_bytes(b"broken")
    assert main(["data", "inspect", *words(root), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.out
    assert "\x1b[31m" not in said.out
    assert "\x1b" not in (tmp_path / "out" / "index.html").read_text()


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["data", "inspect", *words(folder), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "index.html cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word", ["--count=0", "--count=x", "--processes=0", "--windows=-1", "--count=" + "9" * 9999]
)
def test_numbers_that_are_none_are_refused(word, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", "preview", word])
    assert caught.value.code == 2
    assert "is not a whole number of at least" in capsys.readouterr().err


def test_images_are_inspected_if_the_model_takes_them(tmp_path):
    root = make_folder(tmp_path / "set", "ab", num_frames=60)
    (root / "images").mkdir()
    (root / "images" / "a.png").write_bytes(b"no picture")
    records = read_source(root).records
    for images, expected in ((False, []), (True, ["videos/a.mp4"])):
        spec = SampleSpec((ClipShape(9, 32, 32),), fps=8, max_upscale=1.5, images=images)
        facts = inspect_clips(records, spec, num_processes=1)
        bad = [fact for fact in facts if fact.problem is not None]
        assert [fact.record.clip_id for fact in bad] == expected
        assert all("its image a.png" in fact.problem.detail for fact in bad)


def test_windows_are_decoded_spread_over_a_long_clip(tmp_path):
    root = make_folder(tmp_path / "set", "a", num_frames=600, rate=30)
    (facts,) = inspect_clips(read_source(root).records, SPEC, num_processes=1, max_windows=3)
    assert (facts.windows, facts.decoded) == (17, 3)
    damaged = bytearray((root / "videos" / "a.mp4").read_bytes())
    middle = damaged.index(b"mdat") + (damaged.index(b"moov") - damaged.index(b"mdat")) // 2
    damaged[middle - 400 : middle + 400] = bytes(800)
    (root / "videos" / "a.mp4").write_bytes(damaged)
    (facts,) = inspect_clips(read_source(root).records, SPEC, num_processes=1, max_windows=3)
    assert (facts.problem.cause, facts.windows) == ("damaged", 0)
