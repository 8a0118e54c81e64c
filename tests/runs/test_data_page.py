"""The commands of docs/data.md, read from it, take a folder of clips to a training run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sat_train.config.schema.data_section import BucketsConfig, DataConfig, VideoDatasetParams
from tests.forks import run_line
from tests.runs.launching import ROOT
from tests.unit.data.videos import make_folder

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SHORT = "args.train_iters=2 args.save_interval=2 args.eval_interval=null args.valid_video_interval=null"


def five_lines() -> list[str]:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    return block.strip().splitlines()


@pytest.mark.slow
def test_five_lines_from_a_folder_of_clips_to_a_training_run(tmp_path: Path) -> None:
    assert len(five_lines()) == 5
    make_folder(tmp_path / "my_clips", "abc", num_frames=90, height=64, width=96)
    make_folder(tmp_path / "my_clips", ["short"], num_frames=9)
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    export, *lines = five_lines()
    name, value = re.fullmatch(r'export (\w+)="(.*)"', export).groups()  # type: ignore[union-attr]
    for line in lines:
        line = line.partition("  #")[0].replace(f"${name}", f"{value} {SHORT}")
        if "train_video" in line:  # on one process; `torchrun` itself starts the line before
            line = line.replace("torchrun", "python")
        done = run_line(line, cwd=tmp_path)
        assert done.returncode == 0, done.output
    assert "1 clips are left out (short): my_clips/videos/short.mp4" in done.output
    assert "neither T5 nor the VAE is loaded" in done.output
    assert (tmp_path / "data_report" / "index.html").is_file()
    assert (tmp_path / "data_report" / "contact_sheet.png").is_file()
    assert list((tmp_path / "runs").glob("sft-*/2/manifest.json"))


def test_every_refusal_and_option_is_on_the_page() -> None:
    """Causes are those in the code; keys are those of the schema."""
    source = "".join(path.read_text() for path in (ROOT / "sat_train" / "data").rglob("*.py"))
    causes = set(re.findall(r'BadClip\(\s*"([a-z ]+)"', source)) | {"worker died"}
    for cause in causes:
        assert f"`{cause}`" in PAGE, cause
    for schema in (BucketsConfig, VideoDatasetParams, DataConfig):
        for name in set(schema.model_fields) - {"target", "params"}:
            assert re.search(rf"[`,.{{ ]{name}[`,}} ]", PAGE), name
