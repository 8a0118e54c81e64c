"""What only reports never ends a run: the laws of calling callbacks."""

import inspect
import json
import logging

import pytest

from sat_train.errors import SatTrainError, TrainingError
from sat_train.training.loop.callback import Callback, Callbacks

METHODS = [name for name, _ in inspect.getmembers(Callback, inspect.isfunction)]
ARGUMENTS = {
    "closed": (),
    "loss_computed": (None, None),
    "state_dict": (),
    "load_state_dict": ({"Listener": {}, "Listener 2": {}},),
}


class Listener(Callback):
    """Notes what it hears, and raises what it is told to."""

    def __init__(
        self, heard: list[str], name: str, *, optional: bool = False, **raises: BaseException
    ) -> None:
        self.optional = optional
        for method in METHODS:
            setattr(self, method, self._listening(heard, f"{name} {method}", raises.get(method)))

    def _listening(self, heard, what, error):
        def listen(*_):
            heard.append(what)
            if error is not None:
                raise error
            return {}

        return listen


class Odd(Exception):
    """No kind of error that anybody foresees."""


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sat_train"), "propagate", True)
    return caplog


def _call(callbacks: Callbacks, method: str) -> None:
    getattr(callbacks, method)(*ARGUMENTS.get(method, (None,)))


def test_the_methods_are_those_that_the_loop_calls():
    assert set(METHODS) == {
        *("started", "loss_computed", "before_optimizer_step", "step_done", "measure", "reported"),
        *("before_save", "saved", "finished", "failed", "closed"),
        *("state_dict", "load_state_dict", "add_tensors", "load_tensors"),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error", [Odd("strange"), OSError(28, "No space left on device"), SatTrainError("x")]
)
def test_an_optional_callback_may_raise_anything_anywhere_and_is_reported_once(method, error, log):
    heard: list[str] = []
    failing = Listener(heard, "failing", optional=True, **{method: error})
    callbacks = Callbacks([failing, Listener(heard, "other")])
    for _ in range(3):
        _call(callbacks, method)
    assert heard == [f"failing {method}", f"other {method}"] * 3, (
        "it is tried again, and the others are called"
    )
    (record,) = [record for record in log.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("Listener failed, training continues: ")
    assert str(error) in record.getMessage()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "closed"])
def test_what_is_not_optional_ends_the_run_with_its_own_error(method):
    callbacks = Callbacks([Listener([], "needed", **{method: Odd("cause")})])
    with pytest.raises(Odd, match="cause"):
        _call(callbacks, method)


def test_ranks_that_have_parted_end_the_run_even_in_what_is_optional():
    callbacks = Callbacks([Listener([], "videos", optional=True, step_done=TrainingError("parted"))])
    with pytest.raises(TrainingError, match="parted"):
        callbacks.step_done(None)


def test_each_callback_is_closed_and_the_first_error_is_raised_after_the_last(log):
    heard: list[str] = []
    names = {"a": Odd("first"), "b": Odd("second"), "c": None}
    callbacks = Callbacks([Listener(heard, name, closed=error) for name, error in names.items()])
    with pytest.raises(Odd, match="first"):
        callbacks.closed()
    assert heard == ["a closed", "b closed", "c closed"]
    assert "second" in log.text


def test_after_an_error_all_are_closed_and_no_other_error_hides_it(log):
    heard: list[str] = []
    callbacks = Callbacks([Listener(heard, "a", closed=AttributeError("no _bar")), Listener(heard, "b")])
    callbacks.closed_after(Odd("the cause"))
    assert heard == ["a failed", "b failed", "a closed", "b closed"]
    assert "no _bar" in log.text


class Counter(Callback):
    """Counts steps, and says so in the metrics."""

    count = 0

    def step_done(self, trainer) -> None:
        self.count += 1

    def measure(self, trainer) -> dict[str, float]:
        return {"counted": self.count}

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state) -> None:
        self.count = state["count"]


def test_a_callback_resumes_from_what_it_saved_and_its_numbers_are_metrics():
    callbacks = Callbacks([Callback(), Counter()])
    callbacks.step_done(None)
    saved = json.loads(json.dumps(callbacks.state_dict()))
    assert saved == {"Counter": {"count": 1}}, "a callback without a state leaves none"
    resumed = Callbacks([Counter(), Callback()])
    resumed.load_state_dict(saved)
    resumed.step_done(None)
    assert resumed.measure(None) == {"counted": 2}
    both = Callbacks([Counter(), resumed_twice := Counter()])
    both.load_state_dict({"Counter": {"count": 3}, "Counter 2": {"count": 5}})
    assert resumed_twice.count == 5, "two of one class keep their own"
    assert both.state_dict() == {"Counter": {"count": 3}, "Counter 2": {"count": 5}}
    resumed.load_state_dict({})  # the run was saved before it had this callback
