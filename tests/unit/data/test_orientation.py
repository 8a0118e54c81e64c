"""Pictures and videos are shown upright, mirrored where their metadata say so: as every player shows them."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from sat_train.data.clips.clip_file import read_headers
from sat_train.data.clips.frames import open_frames
from sat_train.data.clips.resize import cover_crop
from sat_train.sampling.prompts import read_image

HEIGHT, WIDTH = 32, 64
ORIENTATION = 0x0112
# (a, b, c, d) of a display matrix, which sends the stored point (x, y) to (a x + c y, b x + d y).
MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1)]
MATRICES += [(0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0)]


def four_colours() -> np.ndarray:
    """Returns a picture that looks different in each of the eight orientations."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[: HEIGHT // 2, : WIDTH // 2] = (220, 40, 40)
    picture[: HEIGHT // 2, WIDTH // 2 :] = (40, 220, 40)
    picture[HEIGHT // 2 :, : WIDTH // 2] = (40, 40, 220)
    return picture


def shown(path, height, width):
    def choose_crop(*size):
        assert size == (height, width)
        return cover_crop(source=size, target=size, max_upscale=1)

    with open_frames(path) as reader:
        return reader.read([reader.info.first], choose_crop).video_thwc[0].astype(int)


def assert_alike(picture, expected):
    """Away from the edges between colours, which encoders blur, they differ by no more than these lose."""
    error = np.abs(picture - expected.astype(int)).max(axis=2)
    height, width = error.shape
    for rows in (slice(3, height // 2 - 3), slice(height // 2 + 3, height - 3)):
        for columns in (slice(3, width // 2 - 3), slice(width // 2 + 3, width - 3)):
            assert error[rows, columns].max() <= 12


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_picture_is_rotated_as_its_exif_data_say(tmp_path, suffix, tag):
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    path = tmp_path / f"a{suffix}"
    Image.fromarray(four_colours()).save(path, exif=exif, quality=95)
    with Image.open(path) as picture:
        expected = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    height, width = expected.shape[:2]
    assert (height, width) == ((HEIGHT, WIDTH) if tag < 5 else (WIDTH, HEIGHT))
    assert_alike(shown(path, height, width), expected)
    assert read_headers(path, with_turn=True).shown_size == (height, width)
    sampled = read_image(path, height=height, width=width).permute(1, 2, 0).numpy()
    assert_alike(shown(path, height, width), sampled)


def write_with_matrix(path, matrix):
    a, b, c, d = (part << 16 for part in matrix)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        frame = av.VideoFrame.from_ndarray(four_colours(), format="rgb24")
        for pts in range(3):
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def placed(matrix) -> np.ndarray:
    """Returns the picture with each of its points where the matrix sends it."""
    a, b, c, d = matrix
    stored = four_colours()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    column, row = a * x + c * y, b * x + d * y
    column, row = column - column.min(), row - row.min()
    picture = np.zeros((row.max() + 1, column.max() + 1, 3), np.uint8)
    picture[row, column] = stored
    return picture


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path, matrix):
    write_with_matrix(tmp_path / "a.mp4", matrix)
    expected = placed(matrix)
    assert_alike(shown(tmp_path / "a.mp4", *expected.shape[:2]), expected)
    info = read_headers(tmp_path / "a.mp4", with_turn=True)
    assert info.shown_size == expected.shape[:2]


def test_a_picture_with_damaged_exif_data_is_shown_as_stored(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(four_colours()).save(path, exif=b"Exif\0\0" + b"\xff" * 40, quality=95)
    assert_alike(shown(path, HEIGHT, WIDTH), four_colours())


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_parts_of_webm_are_black(tmp_path, codec):
    """What lies below them is whatever the encoder found cheapest."""
    picture = np.full((HEIGHT, WIDTH, 4), (200, 120, 40, 255), np.uint8)
    picture[:, WIDTH // 2 :, 3] = 0
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        options = {"auto-alt-ref": "0", "cpu-used": "8", "deadline": "realtime", "crf": "4", "b": "2M"}
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuva420p"
        stream.metadata["alpha_mode"] = "1"
        for pts in range(6):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="yuva420p")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with open_frames(tmp_path / "a.webm") as reader:
        frames = reader.read([0.0, 0.3], lambda *s: cover_crop(source=s, target=s, max_upscale=1))
    for shown_picture in frames.video_thwc:
        assert shown_picture[:, WIDTH // 2 + 4 :].max() <= 4
        assert np.abs(shown_picture[:, : WIDTH // 2 - 4].astype(int) - (200, 120, 40)).max() <= 16
