"""The heads of the model files say how much GPU memory the code takes, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.memory import hardware_lines, lora_gb
from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.models.meters import LivingTensors

MODELS = ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b")  # image-to-video adds 16 channels to these


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    start_single_process()
    yield
    stop_processes()


def test_the_counter_counts_what_lives_at_once() -> None:
    layer = torch.nn.Linear(1000, 1000, device="meta")
    x = torch.empty(1000, 1000, device="meta")
    with LivingTensors(layer) as living:
        first = x + 1  # 4 MB
        second = first.view(-1)  # the same bytes
        del first
        third = layer(x)  # 4 MB; the weight and its views count as nothing
        del second, third
        x + 2
    assert living.peak == 8_000_000  # x was there before


@pytest.mark.parametrize("name", MODELS)
def test_hardware_lines_hold(name: str) -> None:
    """Write them again with `python benchmarks/memory.py`."""
    path = Path("configs/model") / f"{name}.yaml"
    assert hardware_lines(path) in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("recipe", "model", "words", "says"),
    [
        ("24gb", "cogvideox_5b", [], "CogVideoX-5B {} GB"),
        ("24gb", "cogvideox_2b", [], "CogVideoX-2B {} GB"),
        ("24gb", "cogvideox1.5_5b", ["data.params.max_num_frames=33"], "max_num_frames=33 {} GB"),
        ("16gb", "cogvideox_5b", [], "CogVideoX-5B {} GB"),
        ("16gb", "cogvideox_2b", ["data.params.max_num_frames=49"], "max_num_frames=49 {} GB"),
        ("16gb", "cogvideox1.5_5b", ["data.params.video_size=[480,720]"], "video_size=[480,720] {} GB"),
    ],
)
def test_small_cards_hold_what_their_recipes_say(
    recipe: str, model: str, words: list[str], says: str
) -> None:
    path = Path(f"configs/recipe/low_vram_{recipe}.yaml")
    files = [f"configs/model/{model}.yaml", "configs/lora.yaml", path]
    config = load_run_config(files, words, purpose="check", check_paths=False)
    need = lora_gb(config)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert says.format(need) in " ".join(head.replace("\n#", " ").split())
    assert need * 1e9 <= int(recipe[:2]) * 2**30
