"""The list of bad clips is a report: where it cannot be written, training continues."""

import logging

from sat_train.data.failure_log import ClipFailure, FailureLog


def test_a_list_that_cannot_be_written_ends_nothing_and_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sat_train"), "propagate", True)
    (tmp_path / "in_the_way").write_text("a file")
    path = tmp_path / "in_the_way" / "quarantine.jsonl"
    failures = FailureLog(num_clips=10, max_bad_fraction=0.5, path=path)
    failures.add(ClipFailure(3, "a.mp4", "damaged", "no frame"))
    failures.check()
    assert [failure.cause for failure in failures.by_clip.values()] == ["damaged"]
    assert f"{path} cannot be written, training continues" in caplog.text
    assert "a.mp4 cannot be used" in caplog.text
