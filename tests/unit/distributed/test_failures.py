"""What the launcher is told of a failure."""

import json

from sat_train.distributed.environment import tell_torchrun


def test_torchrun_gets_the_message_for_its_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_torchrun("the disk is full", 5)
    assert json.loads((tmp_path / "error.json").read_text()) == {
        "message": "the disk is full",
        "timestamp": 5,
    }
