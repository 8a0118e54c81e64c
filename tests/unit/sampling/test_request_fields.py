"""A request names the fields that conditions read, and they are read as those of a clip are."""

import json
from pathlib import Path

import pytest
import torch

from sat_train.cli.sample_videos import read_requests
from sat_train.config import load_run_config
from sat_train.errors import DataError
from sat_train.sampling.build import build_sampling
from sat_train.sampling.request_fields import RequestReader, build_request_reader
from sat_train.sampling.video_file import write_mp4

CONFIG = str(Path(__file__).parents[3] / "configs" / "sample.yaml")
WORDS = ["data.fields.control.kind=video", "model.conditions.c.target=ControlVideo", "args.seed=3"]


def reader_of(folder: Path, *rows: object) -> tuple[list, RequestReader]:
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [*WORDS, f"args.input_file={folder}/requests.jsonl", "args.sampling_num_frames=3"]
    config = load_run_config([CONFIG], words, purpose="sample")
    reader = build_request_reader(config, build_sampling(config))
    assert reader is not None
    return read_requests(config), reader


def read_second(folder: Path, *rows: object) -> None:
    requests, reader = reader_of(folder, *rows)
    reader.sample(requests[1])


def test_a_control_named_in_a_row_has_the_frames_and_the_crop_of_the_video_to_come(tmp_path) -> None:
    ramp = torch.arange(9, dtype=torch.uint8)[:, None, None, None] * 20 + 40
    write_mp4(tmp_path / "grey.mp4", ramp.expand(-1, 3, 128, 256), fps=8)  # wider than the video
    rows = [{"prompt": "a ball", "control": "grey.mp4"}, {"prompt": "b", "control": "grey.mp4", "seed": 3}]
    (request, other), reader = reader_of(tmp_path, *rows)
    assert (other.seed, other.name) == (3, "0001-b-seed3")
    sample = reader.sample(request)
    assert (sample.caption, sample.training, request.seed) == ("a ball", False, 3)
    assert sample.fields["control"].shape == (9, 3, 64, 96)
    assert (sample.fields["control"].float().mean((1, 2, 3)) - ramp.flatten()).abs().max() < 3, "H.264 rounds"
    assert sample.num_shown == 9


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "b", "control": "a.mp4", "seed": -1}, r"requests\.jsonl:2: `seed` is no whole number"),
        ({"prompt": "a ball"}, r"requests\.jsonl:2 gives no field `control`, which a condition"),
        ({"prompt": "a ball", "control": "none.mp4"}, r"requests\.jsonl:2: .*`control` \(none\.mp4\)"),
        ({"prompt": "a ball", "control": "a.txt"}, r"requests\.jsonl:2: a\.txt has not one of the suffixes"),
        ({"prompt": "a ball", "contrl": "a.mp4"}, r"requests\.jsonl:2 has the unknown key `contrl`"),
        ({"control": "a.mp4"}, r"requests\.jsonl:2 has no text `prompt`"),
        ("a ball", r"requests\.jsonl:2 has no text `prompt`"),
    ],
)
def test_a_row_without_what_a_condition_reads_is_refused_by_name(tmp_path, row, says) -> None:
    with pytest.raises(DataError, match=says):
        read_second(tmp_path, {"prompt": "first", "control": "a.mp4"}, row)
