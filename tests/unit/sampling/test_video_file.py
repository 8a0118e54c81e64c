"""Videos and contact sheets as files: what is read back is what was written."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sat_train.errors import SatTrainError
from sat_train.sampling import video_file
from sat_train.sampling.video_file import write_contact_sheet, write_mp4


def _video(frames=9, height=32, width=48):
    """Each frame has one grey, brighter from frame to frame: survives compression, and tells the order."""
    greys = torch.linspace(20, 230, frames).round().to(torch.uint8)
    return greys[:, None, None, None].expand(frames, 3, height, width).contiguous()


def _read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), stream


@pytest.mark.parametrize("fps", [8, 16, 29.97])
def test_an_mp4_gives_back_frames_rate_and_size(tmp_path, fps):
    write_mp4(tmp_path / "new" / "a.mp4", _video(), fps=fps)
    frames, stream = _read(tmp_path / "new" / "a.mp4")
    assert frames.shape == (9, 32, 48, 3)
    assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
    assert stream.codec_context.pix_fmt == "yuv420p"
    # 8-bit limited-range yuv loses about two grey levels
    assert np.abs(frames.mean((1, 2, 3)) - _video().float().mean((1, 2, 3)).numpy()).max() < 3


def test_odd_sizes_are_made_even(tmp_path):
    write_mp4(tmp_path / "a.mp4", _video(frames=1, height=31, width=45), fps=8)
    assert _read(tmp_path / "a.mp4")[0].shape == (1, 32, 46, 3)


def test_without_libx264_the_file_is_mpeg4_and_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video_file.av, "codecs_available", frozenset({"mpeg4"}))
    monkeypatch.setattr(video_file.logger, "propagate", True)
    with caplog.at_level("WARNING", logger="sat_train"):
        write_mp4(tmp_path / "a.mp4", _video(), fps=8)
    assert _read(tmp_path / "a.mp4")[1].codec_context.name == "mpeg4"
    assert "no libx264" in caplog.text


def test_a_failed_write_leaves_nothing_and_names_the_file(tmp_path):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(SatTrainError, match=r"blocked/a\.mp4 cannot be written"):
        write_mp4(tmp_path / "blocked" / "a.mp4", _video(), fps=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocked"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", _video(), fps=8)
    before = (tmp_path / "a.mp4").read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(video_file, "_codec", stop)
    with pytest.raises(KeyboardInterrupt):
        write_mp4(tmp_path / "a.mp4", _video(frames=3), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_contact_sheet_shows_first_and_last_frame_of_every_clip(tmp_path):
    videos = [_video(frames=9), _video(frames=3, width=16)]
    write_contact_sheet(tmp_path / "sheet.png", videos, ["a caption", "another\none " * 50], columns=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    gap = video_file._GAP
    row = video_file._CAPTION_HEIGHT + 32 + 2 * gap
    assert sheet.shape == (2 * row, 4 * (48 + gap) + gap, 3)
    middle = video_file._CAPTION_HEIGHT + 16
    assert [int(sheet[middle, gap + column * (48 + gap) + 24, 0]) for column in (0, 3)] == [20, 230]
    assert [int(sheet[row + middle, gap + column * (16 + gap) + 8, 0]) for column in (0, 2)] == [20, 230]
    # captions are drawn, in both rows
    assert (sheet[: video_file._CAPTION_HEIGHT] < 100).any()
    assert (sheet[row : row + video_file._CAPTION_HEIGHT] < 100).any()


def test_the_same_frames_give_the_same_bytes_whatever_memory_held_before(tmp_path):
    frames = torch.randint(
        0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    files = set()
    for number in range(25):
        leftovers = [torch.randn(1 + 7919 * number * step % 100_000) for step in range(5)]
        write_mp4(tmp_path / "a.mp4", frames.clone(), fps=8)
        files.add((tmp_path / "a.mp4").read_bytes())
        del leftovers
    assert len(files) == 1
