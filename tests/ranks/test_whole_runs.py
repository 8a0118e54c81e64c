"""Whole runs through `train(config, mesh)`: resume, world size, what may change, what a run leaves."""

import io
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sat_train.checkpoint.fragments import AVERAGE, MASTER, read_fragments
from sat_train.checkpoint.layout import CLIENT_STATE, committed_steps
from sat_train.checkpoint.manifest import read_manifest
from sat_train.distributed.processes import ProcessMesh, stop_processes
from sat_train.errors import SatTrainError
from sat_train.interchange.sources import find_weights
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.training.resume import CONFIG_KEY, find_resumed
from tests.ranks.micro import TIMES, logged_micro, micro_run, train_micro, write_micro
from tests.ranks.micro import run_directory as _run_directory

pytestmark = pytest.mark.ranks

STEPS = 6
# A length-independent learning rate, so that a run that ends early is the beginning of a longer one.
SHAPE = ["args.warmup=2", "args.lr_decay_iters=10", "args.lr_decay_style=cosine", "args.save_interval=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("micro")
    write_micro(path)
    stop_processes()
    return path


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory) -> Path:
    """A model that two ranks of the model axis can share."""
    path = tmp_path_factory.mktemp("heads")
    write_micro(path, heads=2)
    stop_processes()
    return path


def _words(name: str, steps: int, *words: str, batch_size: int = 2) -> list[str]:
    return [
        *SHAPE,
        f"args.experiment_name={name}",
        f"args.train_iters={steps}",
        f"args.batch_size={batch_size}",
        f"args.eval_batch_size={batch_size}",
        *words,
    ]


def _records(folder: Path, name: str) -> list[dict]:
    records = read_metrics(_run_directory(folder, name) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def _shards(folder: Path) -> dict[str, Any]:
    """Returns everything that is saved but the configuration, which says how the run was started."""
    shards = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    client_state = json.loads((folder / CLIENT_STATE).read_text())
    return {**shards, CLIENT_STATE: {key: value for key, value in client_state.items() if key != CONFIG_KEY}}


def _check_equal(first: Any, second: Any, where: str = "") -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            _check_equal(value, second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            _check_equal(one, other, f"{where}/{index}")
    elif type(first).__module__ == "builtins":
        assert first == second, where
    else:
        _check_equal(vars(first), vars(second), where)


# Averages and accumulation ride along where they cost no case of their own.
EXTRA = {1: ["args.ema_decay=0.9"], 2: ["args.gradient_accumulation_steps=2"], 3: ["args.ema_decay=0.9"]}
# Each stage with either preset and on one rank and two: what else a layout can change is a state that another
# loads, which test_any_to_any.py compares element by element.
CASES = [
    (preset, 1 + (stage % 2 == i), [f"args.zero_stage={stage}", *EXTRA.get(stage, [])])
    for stage in (0, 1, 2, 3)
    for i, preset in enumerate(("lora", "sft"))
]


@pytest.mark.parametrize(("preset", "world_size", "words"), CASES)
def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(
    rank_pool, folder, preset, world_size, words
):
    """The run resumes at its third step, which sets what it had done after it aside."""
    name = f"{preset}{world_size}{''.join(words)}".replace("args.", "").replace("=", "").replace(".", "")
    words = _words(name, STEPS, *words, "args.save_interval=3")
    rank_pool(world_size)(train_micro, folder, words, preset)
    straight, run_directory = _records(folder, name), _run_directory(folder, name)
    rank_pool(world_size)(train_micro, folder, [*words, f"args.resume={run_directory}/3"], preset)
    resumed = _records(folder, name)
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    assert resumed == straight
    assert len({record["loss"] for record in straight}) == STEPS
    shards = [_shards(run_directory / step) for step in (f"{STEPS}.abandoned", str(STEPS))]
    _check_equal(*shards)
    fragments = [each for shard in shards[0].values() for each in shard.get("fragments", ())]
    assert {AVERAGE in fragment["tensors"] for fragment in fragments} == {"ema" in name}


@pytest.mark.parametrize("preset", ["sft", "lora"])
def test_the_loss_sequence_does_not_depend_on_the_world_size(rank_pool, folder, preset):
    words = ["args.eval_interval=2", "args.eval_iters=2", "args.eval_batch_size=4"]  # which the ranks share
    names = [f"{preset}world{world_size}" for world_size in (1, 2)]
    rank_pool(1)(train_micro, folder, _words(names[0], 3, *words, batch_size=4), preset)
    rank_pool(2)(train_micro, folder, _words(names[1], 3, *words, batch_size=2), preset)
    one, two = (_records(folder, name) for name in names)
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() & {"loss", "grad_norm", "lr", "valid_loss", "valid_samples"}:
            # sums of the same fp32 numbers in another order, amplified by Adam over three steps
            assert second[key] == pytest.approx(first[key], rel=1e-3 if key == "grad_norm" else 1e-4)
    assert one[0]["step"] == 0, "a run begins with a validation"
    assert {record["step"] for record in one if "valid_loss" in record} == {0, 2, 3}


def _train_and_stop(mesh: ProcessMesh, folder: Path, words: list[str]) -> None:
    """Sends SIGUSR1 to this process once three steps are logged; the other ranks get none."""

    def stop() -> None:
        while True:
            metrics = [*(folder / "runs").glob("stopped-*/metrics.jsonl")]
            if metrics and len(read_metrics(metrics[0])) >= 3:
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    if mesh.rank == 1:
        threading.Thread(target=stop, daemon=True).start()
    train_micro(mesh, folder, words)


def test_a_signal_to_one_rank_saves_and_leaves_a_marker_and_the_run_resumes(rank_pool, folder):
    words = _words("stopped", 300)
    rank_pool(2)(_train_and_stop, folder, words)
    run_directory = _run_directory(folder, "stopped")
    stopped_at = int((run_directory / "PREEMPTED").read_text())
    assert 3 <= stopped_at < 300
    assert (run_directory / str(stopped_at) / "manifest.json").exists()
    assert not (run_directory / "run.lock").exists()
    more = _words("stopped", stopped_at + 1, "args.resume=auto")
    rank_pool(2)(train_micro, folder, more)
    assert not (run_directory / "PREEMPTED").exists()
    assert [record["step"] for record in _records(folder, "stopped")] == list(range(1, stopped_at + 2))


def test_old_checkpoints_go_and_the_folder_says_what_ran(rank_pool, folder):
    rank_pool(1)(
        train_micro,
        folder,
        _words("kept", 5, "args.save_interval=1", "args.keep_last=2", "args.keep_every=2"),
    )
    run_directory = _run_directory(folder, "kept")
    steps = sorted(int(path.name) for path in run_directory.iterdir() if path.name.isdigit())
    assert steps == [2, 4, 5]
    assert (run_directory / "latest").read_text() == "5"
    assert "train_iters: 5" in (run_directory / "resolved.yaml").read_text()


VIDEOS = [
    "args.warmup=0",
    "args.eval_interval=2",
    "args.valid_video_interval=2",
    "args.eval_iters=1",
    "args.sampling_steps=2",
]
PROMPTS = "args.valid_prompts=[a,b,c]"
SAMPLE_FILES = ["00.mp4", "01.mp4", "02.mp4", "contact_sheet.png"]


def _sample_files(folder: Path, name: str, step: int) -> list[str]:
    return sorted(path.name for path in (_run_directory(folder, name) / "samples" / f"{step:06d}").iterdir())


def test_samples_are_drawn_on_all_ranks_and_shown_in_tensorboard(rank_pool, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = _words("drawn", 2, *VIDEOS, PROMPTS, "args.zero_stage=3", "args.tensorboard=true")
    rank_pool(2)(train_micro, folder, words)
    assert _sample_files(folder, "drawn", 2) == SAMPLE_FILES
    run_directory = _run_directory(folder, "drawn")
    events = EventAccumulator(str(run_directory / "tensorboard")).Reload()
    (image,) = events.Images("valid/samples")
    assert image.step == 2
    assert image.encoded_image_string == (run_directory / "samples/000002/contact_sheet.png").read_bytes()
    width, height = Image.open(io.BytesIO(image.encoded_image_string)).size
    assert (image.width, image.height) == (width, height)


@pytest.mark.parametrize("steps", [2, 3])
def test_what_validation_owed_when_a_run_was_killed_is_made_up_for(rank_pool, folder, steps):
    """A run killed in the validation of a saved step leaves the checkpoint, no loss, and not all videos."""
    name = f"owed{steps}"
    words = [*VIDEOS, PROMPTS, "args.zero_stage=1"]
    rank_pool(1)(train_micro, folder, _words(name, 2, *words))
    records, run_directory = _records(folder, name), _run_directory(folder, name)
    videos = {path.name: path.read_bytes() for path in (run_directory / "samples/000002").iterdir()}
    for path in ("02.mp4", "contact_sheet.png"):
        (run_directory / "samples/000002" / path).unlink()
    lines = (run_directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "valid_loss" in lines[-1]
    (run_directory / "metrics.jsonl").write_text("".join(lines[:-1]))

    rank_pool(1)(train_micro, folder, _words(name, steps, *words, "args.resume=must"))
    assert _records(folder, name)[: len(records)] == records
    made = {path.name: path.read_bytes() for path in (run_directory / "samples/000002").iterdir()}
    assert made == videos


def test_videos_that_cannot_be_written_end_no_run(rank_pool, folder):
    rank_pool(2)(train_micro, folder, _words("unwritten", 1, "args.warmup=0", "args.zero_stage=3"))
    run_directory = _run_directory(folder, "unwritten")
    (run_directory / "samples").write_text("in the way")
    words = _words("unwritten", 2, *VIDEOS, PROMPTS, "args.zero_stage=3", "args.resume=must")
    rank_pool(2)(train_micro, folder, words)
    assert (run_directory / "2" / "manifest.json").exists()
    assert [record["step"] for record in _records(folder, "unwritten") if "loss" in record] == [1, 2]


def _masters(run_directory: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_directory / str(step)
    return dict(read_fragments(folder, read_manifest(folder)).whole(MASTER))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_resumed_run_takes_the_weight_decay_of_its_configuration(rank_pool, folder, zero_stage):
    name = f"decay{zero_stage}"
    words = [f"args.zero_stage={zero_stage}", "args.save_interval=1", "args.warmup=0", "args.weight_decay=0"]
    rank_pool(1)(train_micro, folder, _words(name, 2, *words))
    run_directory = _run_directory(folder, name)
    before, after = _masters(run_directory, 1), {"0": _masters(run_directory, 2)}
    changed = [*words, f"args.resume={run_directory}/1", "args.weight_decay=0.5"]
    rank_pool(1)(train_micro, folder, _words(name, 2, *changed))
    after["0.5"] = _masters(run_directory, 2)
    lr = _records(folder, name)[-1]["lr"]
    for key, weight in before.items():
        decay = 0.5 if weight.dim() > 1 else 0.0  # vectors never decay
        torch.testing.assert_close(
            after["0"][key] - after["0.5"][key], lr * decay * weight, rtol=1e-3, atol=1e-6
        )


# ZeRO stage and ranks of the data and the model axis of a run that is resumed, and of the one that resumes it
MOVES = [
    ("sft", (3, 2, 1), (1, 2, 2)),
    ("sft", (2, 2, 2), (0, 1, 1)),
    ("lora", (1, 2, 2), (3, 1, 1)),
    ("lora", (0, 2, 1), (2, 2, 2)),
]


@pytest.mark.parametrize(("preset", "before", "after"), MOVES)
def test_a_run_resumes_on_another_mesh_and_at_another_zero_stage(rank_pool, two_heads, preset, before, after):
    folder = two_heads
    name = f"moved{preset}{before}{after}".translate(str.maketrans("", "", "(), "))

    def train(layout: tuple[int, int, int], *more: str) -> list[dict]:
        stage, ranks, model = layout
        words = [f"args.zero_stage={stage}", f"args.model_parallel_size={model}", *more]
        words = _words(name, STEPS, *words, "args.save_interval=3", batch_size=4 * model // ranks)
        rank_pool(ranks)(train_micro, folder, words, preset, model_parallel_size=model)
        return _records(folder, name)

    straight = train(before)
    moved = train(after, f"args.resume={_run_directory(folder, name)}/3")
    assert [record["step"] for record in moved] == list(range(1, STEPS + 1))
    assert len({record["loss"] for record in straight}) == STEPS
    for first, second in zip(straight, moved, strict=True):
        # sums in another order, in fp32, over six steps of lr 1e-2
        assert second["loss"] == pytest.approx(first["loss"], rel=2e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=2e-3)


def _refused(mesh: ProcessMesh, folder: Path, words: list[str]) -> str:
    with pytest.raises(SatTrainError) as caught:
        train_micro(mesh, folder, words)
    return str(caught.value)


@pytest.fixture(scope="module")
def with_base(folder, rank_pool) -> Path:
    """The folder with a run of three steps in it."""
    rank_pool(1)(train_micro, folder, _words("base", 3))
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["args.resume=must", "args.experiment_name=never"], r"args\.resume = must"),
        (["args.resume=must", "args.seed=5"], r"args\.seed = 5: expected 1234, as in the checkpoint"),
        (["args.resume=must", "args.bf16=true"], r"args\.bf16 = True: expected False"),
        (["args.resume=none", "args.save=/proc/nowhere"], r"args\.save = /proc/nowhere"),
    ],
)
def test_a_run_that_cannot_resume_is_refused(rank_pool, with_base, words, message):
    (result,) = rank_pool(1)(_refused, with_base, _words("base", 4, *words))
    assert re.search(message, result)


def test_a_learning_rate_that_explodes_stops_the_run_and_keeps_the_last_checkpoint(rank_pool, folder):
    words = _words("exploded", 8, "args.zero_stage=1", "args.lr=1e30", "args.clip_grad=0")
    words += ["args.save_interval=1", "args.warmup=0"]
    (message,) = rank_pool(1)(_refused, folder, words)
    assert re.search(r"the loss is not finite(.|\n)*train/videos/\w+\.mp4", message)
    assert find_resumed(micro_run(folder, *words, "args.resume=auto")).step >= 1


def test_going_back_to_an_older_step_leaves_one_line_of_history(rank_pool, folder):
    name = "back"
    rank_pool(1)(train_micro, folder, _words(name, 6, "args.keep_last=2", "args.keep_every=2"))
    run_directory = _run_directory(folder, name)
    words = [f"args.resume={run_directory}/2", "args.keep_last=2", "args.save_interval=1", "args.lr=5e-3"]
    (lines,) = rank_pool(1)(logged_micro, folder, _words(name, 5, *words))
    jump = "the learning rate jumps: step 3 has 0.005; with the settings of the checkpoint it would have 0.01"
    assert jump in lines
    assert committed_steps(run_directory) == [5, 4, 2]
    assert sorted(path.name for path in run_directory.glob("*.abandoned")) == ["4.abandoned", "6.abandoned"]
    assert (run_directory / "latest").read_text() == "5"
    assert find_weights(run_directory).path.name == "5"
    assert find_resumed(micro_run(folder, *_words(name, 6, "args.resume=auto", "args.lr=5e-3"))).step == 5
    assert [record["step"] for record in _records(folder, name)] == [1, 2, 3, 4, 5]
    for record in _records(folder, name):  # two samples a step, of one part of the schedule or of two
        by_timestep = [value for key, value in record.items() if key.startswith("loss_t")]
        assert sum(by_timestep) / len(by_timestep) == pytest.approx(record["loss"], rel=1e-6)
    head = (run_directory / "resolved.yaml").read_text()
    assert "# resumed at step 2\n" in head
    assert (
        "# deepspeed.optimizer.params.lr = 0.005 (was 0.01)" in head or "# args.lr = 0.005 (was 0.01)" in head
    )
    (lines,) = rank_pool(1)(logged_micro, folder, _words(name, 6, "args.resume=auto", "args.lr=5e-3"))
    assert not [line for line in lines if "jumps" in line], "the curve is that of the checkpoint"


def test_a_run_warns_of_what_only_its_data_show(rank_pool, folder):
    length = "model.conditioner_config.params.emb_models.0.params.max_length=6"
    positions = "model.network_config.params.modules.pos_embed_config.params.text_length=6"
    words = _words("captions", 1, "args.save=null", length, positions, "args.warmup=0")
    (lines,) = rank_pool(1)(logged_micro, folder, words)
    (warning,) = [line for line in lines if "captions_fit_the_text_encoder" in line]
    assert "max_length = 6: expected captions of at most 6 tokens: 100% are longer" in warning


def test_a_finished_run_says_so_and_is_left_as_it_is(rank_pool, folder):
    rank_pool(1)(train_micro, folder, _words("finished", 6))
    run_directory = _run_directory(folder, "finished")
    (run_directory / "PREEMPTED").write_text("4\n")

    def contents():
        return {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file()}

    before = {path: data for path, data in contents().items() if path.name != "PREEMPTED"}
    for words in (
        ["args.resume=auto"],
        ["args.resume=auto", "args.lr=5e-3"],
        [f"args.resume={run_directory}/4"],
    ):
        steps = 4 if "/" in words[0] else 6
        (lines,) = rank_pool(1)(logged_micro, folder, _words("finished", steps, *words))
        text = "\n".join(lines)
        assert f"finished already: step {steps} of {steps} (raise args.train_iters to continue)" in text
        assert "training steps" not in text
        assert ("the changed settings have no effect: args.lr = 0.005" in text) == (len(words) == 2)
        assert contents() == before, "a batch script must not find the mark of a stopped run again"


def test_a_resume_that_fails_leaves_the_folder_byte_for_byte(rank_pool, folder):
    rank_pool(1)(train_micro, folder, _words("kept_whole", 4))
    run_directory = _run_directory(folder, "kept_whole")
    before = {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file()}
    for wrong in (["args.seed=5"], ["model.not_trainable_prefixes=[mixins]"], ["args.load=/nowhere.pt"]):
        rank_pool(1)(_refused, folder, _words("kept_whole", 6, f"args.resume={run_directory}/2", *wrong))
        assert {path: path.read_bytes() for path in run_directory.rglob("*") if path.is_file()} == before
