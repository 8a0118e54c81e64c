"""One seed of one card, trained again for the first part of its run."""

from __future__ import annotations

from pathlib import Path

from sat_train.cli.main import main
from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.training.build import train
from sat_train.training.callbacks.validation_file import read_validations
from sat_train.training.expected_curve import read_card

CARD = Path(__file__).parents[2] / "docs/recipes/sat_lora.json"


def test_a_seed_of_a_card_lies_in_its_band_when_it_is_trained_again(tmp_path, capsys):
    card = read_card(CARD)
    first = sorted(card.losses)[1]
    words = [*card.words, f"args.seed={card.seeds[0]}", f"args.train_iters={first}", f"args.save={tmp_path}"]
    words += [
        "args.device=cpu",
        "args.num_workers=0",
        "args.tensorboard=false",
        f"args.save_interval={first}",
    ]
    words += ["data.cache=fill", f"data.cache_dir={tmp_path / 'cache'}", "args.experiment_name=again"]
    train(load_run_config(list(card.base), words), start_single_process())
    (run,) = tmp_path.glob("again-*")
    for step, losses in read_validations(run).items():
        assert card.place(step, losses.mean().mean) == "inside"
    assert main(["compare", str(run), str(CARD)]) == 0
    assert f"{first}  " in capsys.readouterr().out
