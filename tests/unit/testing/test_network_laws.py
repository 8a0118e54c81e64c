"""Each law of an extension holds for a sound one, and names the culprit of a planted fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.distributed.processes import stop_processes
from sat_train.testing import BrokenLaws, check_extension
from tests.unit.testing.faulty import used, write_faulty

QUICK = ("typos", "base", "gradients", "batch", "drop", "order", "shapes", "recompute", "compile")


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stop_processes()
    return write_faulty(tmp_path_factory.mktemp("faulty"))


def test_all_laws_hold_for_a_sound_extension(extension: Path) -> None:
    report = check_extension(extension, *used(), laws=QUICK)
    assert {each.law: each.outcome for each in report.results} == dict.fromkeys(QUICK, "holds")
    assert "compile" in str(report)
    assert "2 graphs for 2 blocks" in str(report)  # no token of a frozen base has a gradient at first


@pytest.mark.parametrize(
    ("law", "fault", "message"),
    [
        ("base", "base", r"the prediction differs by .*begin at zero what fuser adds"),
        ("gradients", "unused", r"mixins\.fuser\.spare\.weight, .*spare\.bias got no gradient"),
        ("gradients", "zeros", r"mixins\.fuser\.per_block\.0\.weight.* zero gradients in three steps"),
        ("batch", "extras", r"extras 'fuser' has the shape \[1, 8\]: its first dimension is not the batch"),
        ("shapes", "shape", r"after a batch of another size, .* differs .* table is kept for one size"),
        ("recompute", "state", r"with checkpoint_activations, the gradient of .*keeps state, and runs twice"),
        (
            "compile",
            "index",
            r"3 graphs were compiled where 2 do for the sorts of blocks: a hook reads block\.index",
        ),
        ("compile", "break", r"a block does not compile whole"),
    ],
)
def test_a_fault_of_a_module_is_named(extension: Path, law: str, fault: str, message: str) -> None:
    few = {"break": 1, "index": 3}  # each layer that is traced takes seconds; an index shows at the third
    layers = f"model.network_config.params.num_layers={few.get(fault, 2)}"
    with pytest.raises(BrokenLaws, match=message):
        check_extension(extension, *used(fault=fault), layers, laws=[law])


def test_a_module_that_depends_on_the_order_is_found(extension: Path) -> None:
    second = "model.modules.second={target: Fuser, params: {fault: order}}"
    around = "model.hook_order={attention_fn: [fuser, second]}"
    with pytest.raises(BrokenLaws, match=r"with modules and conditions in reverse order, .* differs"):
        check_extension(extension, *used(fault="order"), second, around, laws=["order"])


@pytest.mark.parametrize(
    ("law", "fault", "message"),
    [
        ("batch", "batch", r"extras bright: 3 rows, another batch"),
        (
            "drop",
            "rows",
            r"dropping bright from samples 0 and 4 changes samples \[0, 1, 2, 3, 4\]: rows are mixed",
        ),
    ],
)
def test_a_fault_of_a_condition_is_named(extension: Path, law: str, fault: str, message: str) -> None:
    with pytest.raises(BrokenLaws, match=message):
        check_extension(extension, *used(condition_fault=fault), laws=[law])


def test_a_record_that_accepts_any_key_is_named(extension: Path) -> None:
    with pytest.raises(BrokenLaws, match=r"modules\.fuser\.params\.faultx=1 is accepted: LooseParams must"):
        check_extension(extension, *used(module="Loose"), laws=["typos"])


def test_a_law_that_does_not_exist_is_refused(extension: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no law bass, but typos, base"):
        check_extension(extension, laws=["bass"])
