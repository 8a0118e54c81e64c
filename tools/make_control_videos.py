"""Makes small sets of clips whose content is determined by a field beside them, and by nothing else.

    python tools/make_control_videos.py /tmp/control   # mosaic/ moving/ camera/, each with train/ and valid/

mosaic
    A picture of coloured squares, and a disc that moves over it. `control`, a video, is a grey map of all of
    it: each grey level stands for one colour. `reference`, an image, is the picture without the disc, and so
    is the first frame but for the disc. `mask`, a video, is a moving box: what is to be painted.
moving
    Three discs on one ground, which is the same in all clips. `tracks` has x and y of each disc in each
    frame, `trails` is a video of these tracks, drawn. `sound` has 8 numbers in each frame, of which the
    first is the size of the discs. `losers` is a clip whose discs move elsewhere.
camera
    A textured wall, the same in all clips, seen by a moving camera: `poses`, camera to world in each frame,
    and `intrinsics`, fx, fy, cx, cy in pixels in each frame.

The captions of a set are equal, so they tell nothing. Each part is a folder with `videos/`, `labels/` and a
folder for each field, and a `manifest.jsonl` that names them all. The output is a function of the code alone,
and no clip of `valid` is in `train`. Clips have 33 frames of 64x96 at 16 frames a second, of which a model at
8 a second takes every second one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, FRAMES, FPS = 64, 96, 33, 16
FIRST_VALID_SEED = 1_000_000
CELL = 16  # side of a square of the mosaic
# A grey level of the control stands for a colour: nothing but this table is to be learnt.
GREYS = np.array([40, 100, 160, 220], np.uint8)
COLORS = np.array([(30, 60, 200), (210, 50, 40), (50, 180, 70), (240, 210, 60)], np.uint8)
DISC_GREY, DISC_COLOR = 255, (250, 250, 250)
DISC_COLORS = ((230, 60, 50), (60, 200, 90), (70, 110, 240))
FEATURES = 8  # numbers of `sound` in each frame
TEXTURE_SEED = 7


@dataclass(frozen=True)
class ControlledClip:
    """A clip and its fields.

    Args:
        frames_thwc: uint8 RGB.
        caption: The same for all clips of a set.
        fields: By name, a video uint8 [t, h, w, 3], a picture uint8 [h, w, 3], or numbers float32 [t, ...].
    """

    frames_thwc: np.ndarray
    caption: str
    fields: Mapping[str, np.ndarray]


def smooth_walk(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """Returns `count` numbers in [low, high] that follow each other smoothly, `[FRAMES, count]`."""
    time = np.linspace(0, 1, FRAMES)[:, None]
    waves = np.sin(2 * np.pi * (rng.uniform(0.4, 1.2, count) * time + rng.random(count)))
    return (low + (high - low) * (waves + 1) / 2).astype(np.float32)


def disc_alpha(x: float, y: float, radius: float) -> np.ndarray:
    """Returns the share of each pixel that a disc covers, `[h, w, 1]`; its edge is one pixel wide."""
    row, column = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    return np.clip(radius + 0.5 - np.hypot(column - x, row - y), 0, 1)[..., None]


def paint(picture_hwc: np.ndarray, alpha_hw1: np.ndarray, color: object) -> np.ndarray:
    return picture_hwc * (1 - alpha_hw1) + np.asarray(color, np.float32) * alpha_hw1


def to_bytes(frames: list[np.ndarray]) -> np.ndarray:
    return np.stack(frames).round().clip(0, 255).astype(np.uint8)


def draw_mosaic(seed: int) -> ControlledClip:
    """Draws a mosaic and a disc that moves over it."""
    rng = np.random.default_rng((1, seed))
    chosen = rng.integers(len(COLORS), size=(HEIGHT // CELL, WIDTH // CELL))
    chosen_hw = chosen.repeat(CELL, axis=0).repeat(CELL, axis=1)
    picture, grey = COLORS[chosen_hw], GREYS[chosen_hw][..., None].repeat(3, axis=2)
    x, y = smooth_walk(rng, 1, 12, WIDTH - 12)[:, 0], smooth_walk(rng, 1, 12, HEIGHT - 12)[:, 0]
    left, top = smooth_walk(rng, 1, 0, WIDTH - 40)[:, 0], smooth_walk(rng, 1, 0, HEIGHT - 32)[:, 0]
    discs = [disc_alpha(*point, 8.0) for point in zip(x, y, strict=True)]
    mask = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for frame in range(FRAMES):
        row, column = int(top[frame]), int(left[frame])
        mask[frame, row : row + 32, column : column + 40] = 255
    return ControlledClip(
        to_bytes([paint(picture, alpha, DISC_COLOR) for alpha in discs]),
        "a mosaic",
        {
            "control": to_bytes([paint(grey, alpha, DISC_GREY) for alpha in discs]),
            "mask": mask,
            "reference": picture,
        },
    )


def draw_moving(seed: int) -> ControlledClip:
    """Draws three discs that move on a ground."""
    rng = np.random.default_rng((2, seed))
    tracks, lost = (
        np.stack([smooth_walk(rng, 3, 10, WIDTH - 10), smooth_walk(rng, 3, 10, HEIGHT - 10)], axis=2)
        for _ in range(2)
    )
    sound = smooth_walk(rng, FEATURES, 0, 1)
    return ControlledClip(
        draw_discs(tracks, sound),
        "three discs",
        {"tracks": tracks, "trails": draw_trails(tracks), "sound": sound, "losers": draw_discs(lost, sound)},
    )


def draw_discs(tracks_tn2: np.ndarray, sound_tf: np.ndarray) -> np.ndarray:
    """Draws discs as large as the sound is loud, the first at the back."""
    shade = np.linspace(60, 110, HEIGHT, dtype=np.float32)[:, None, None]
    ground, frames = np.broadcast_to(shade, (HEIGHT, WIDTH, 3)), []
    for points, sound in zip(tracks_tn2, sound_tf, strict=True):
        picture = ground
        for point, color in zip(points, DISC_COLORS, strict=True):
            picture = paint(picture, disc_alpha(*point, 5 + 8 * sound[0]), color)
        frames.append(picture)
    return to_bytes(frames)


def draw_trails(tracks_tn2: np.ndarray) -> np.ndarray:
    """Draws the last half second of each track in its disc's colour, brighter where it is newer."""
    frames = []
    for frame in range(FRAMES):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for age in range(min(frame, FPS // 2), -1, -1):
            for point, color in zip(tracks_tn2[frame - age], DISC_COLORS, strict=True):
                picture = paint(picture, disc_alpha(*point, 2.5), np.asarray(color) * (1 - age / FPS))
        frames.append(picture)
    return to_bytes(frames)


def draw_camera(seed: int) -> ControlledClip:
    """Draws the plane z = 0, seen by a camera in front of it that moves and turns."""
    rng = np.random.default_rng((3, seed))
    centers = np.concatenate([smooth_walk(rng, 2, -0.8, 0.8), smooth_walk(rng, 1, -2.2, -1.4)], axis=1)
    turns = smooth_walk(rng, 3, -0.25, 0.25)
    focal = rng.uniform(0.8, 1.1) * WIDTH
    intrinsics = np.array([focal, focal, WIDTH / 2, HEIGHT / 2], np.float32)
    poses = np.stack([pose_of(center, turn) for center, turn in zip(centers, turns, strict=True)])
    frames = [texture_at(*hit_plane(pose, intrinsics)) for pose in poses]
    fields = {"poses": poses, "intrinsics": np.tile(intrinsics, (FRAMES, 1))}
    return ControlledClip(to_bytes(frames), "a wall", fields)


def pose_of(center_3: np.ndarray, turn_3: np.ndarray) -> np.ndarray:
    """Returns camera to world, `[3, 4]`: looks along z, turned about x, y and z by so many radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(turn_3), np.sin(turn_3)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.concatenate([about_z @ about_y @ about_x, center_3[:, None]], axis=1).astype(np.float32)


def hit_plane(pose_34: np.ndarray, intrinsics_4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y on the plane z = 0 at each pixel's centre, `[h, w]` each."""
    row, column = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    fx, fy, cx, cy = intrinsics_4
    rays = np.stack([(column - cx) / fx, (row - cy) / fy, np.ones_like(row)], axis=-1) @ pose_34[:, :3].T
    center = pose_34[:, 3]
    distance = -center[2] / rays[..., 2]
    return center[0] + distance * rays[..., 0], center[1] + distance * rays[..., 1]


def texture_at(x_hw: np.ndarray, y_hw: np.ndarray) -> np.ndarray:
    """Returns the colours of the plane: squares that differ, smooth at their edges, `[h, w, 3]`."""
    size, side = 16, 0.4
    colors = np.random.default_rng(TEXTURE_SEED).uniform(20, 235, (size, size, 3))
    across, down = x_hw / side, y_hw / side
    column, row = np.floor(across).astype(int), np.floor(down).astype(int)
    right, below = smooth_step(across - column), smooth_step(down - row)
    corner = lambda i, j: colors[(row + i) % size, (column + j) % size]  # noqa: E731
    upper = corner(0, 0) * (1 - right) + corner(0, 1) * right
    lower = corner(1, 0) * (1 - right) + corner(1, 1) * right
    return upper * (1 - below) + lower * below


def smooth_step(share_hw: np.ndarray) -> np.ndarray:
    """Returns 0 up to 0.35, 1 from 0.65, and a line between, `[h, w, 1]`."""
    return np.clip((share_hw - 0.35) / 0.3, 0, 1)[..., None]


SETS: dict[str, Callable[[int], ControlledClip]] = {
    "mosaic": draw_mosaic,
    "moving": draw_moving,
    "camera": draw_camera,
}


def write_video(path: Path, frames_thwc: np.ndarray) -> None:
    """Writes H.264 with one thread, so that the bytes depend on the frames alone."""
    options = {"crf": "8", "preset": "fast", "threads": "1"}
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames_thwc.shape[1:3], "yuv420p"
        for picture in frames_thwc:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_field(folder: Path, name: str, value: np.ndarray) -> Path:
    """Writes a video, a picture or numbers, and returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    if value.dtype != np.uint8:
        path = folder / f"{name}.npy"
        np.save(path, value)
    elif value.ndim == 4:
        path = folder / f"{name}.mp4"
        write_video(path, value)
    else:
        path = folder / f"{name}.png"
        av.VideoFrame.from_ndarray(value, format="rgb24").to_image().save(path)
    return path


def write_part(folder: Path, draw: Callable[[int], ControlledClip], *, first_seed: int, clips: int) -> None:
    """Replaces a folder by so many clips with their fields."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "labels").mkdir(parents=True)
    rows = []
    for number in range(clips):
        clip, name = draw(first_seed + number), f"{number:04d}"
        files = {"video": write_field(folder / "videos", name, clip.frames_thwc)}
        files |= {field: write_field(folder / field, name, value) for field, value in clip.fields.items()}
        (folder / "labels" / f"{name}.txt").write_text(clip.caption + "\n", encoding="utf-8")
        columns = {column: path.relative_to(folder).as_posix() for column, path in files.items()}
        rows.append(json.dumps({**columns, "caption": clip.caption}))
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_sets(output: Path, *, sets: tuple[str, ...] = tuple(SETS), train: int, valid: int) -> None:
    """Writes the chosen sets below a folder."""
    for name in sets:
        write_part(output / name / "train", SETS[name], first_seed=0, clips=train)
        write_part(output / name / "valid", SETS[name], first_seed=FIRST_VALID_SEED, clips=valid)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=tuple(SETS))
    parser.add_argument("--train", type=int, default=96, help="clips to train on, of each set")
    parser.add_argument("--valid", type=int, default=16, help="clips held out")
    options = parser.parse_args()
    write_sets(options.output, sets=tuple(options.sets), train=options.train, valid=options.valid)
    for name in options.sets:
        size = sum(path.stat().st_size for path in (options.output / name).rglob("*") if path.is_file())
        print(f"{options.output / name}: {options.train} and {options.valid} clips, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
