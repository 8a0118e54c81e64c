"""Operations on the meta device whose outputs are made from what an earlier call returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sat_train.models.meta_outputs import run_on_meta
from sat_train.models.meters import FlopMeter

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


CALLS: dict[str, tuple[Any, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "an elementwise operation": (aten.add.Tensor, lambda: ((meta(3, 4), meta(4)), {})),
    "with a transposed input": (aten.add.Tensor, lambda: ((meta(4, 3).t(), meta(3, 1)), {})),
    "with a number": (aten.mul.Tensor, lambda: ((meta(3, dtype=torch.int64), 2.0), {})),
    "with several outputs": (
        aten.native_layer_norm.default,
        lambda: ((meta(2, 8), [8], None, None, 1e-5), {}),
    ),
    "with an output that is nothing": (
        aten.native_layer_norm_backward.default,
        lambda: ((meta(2, 8), meta(2, 8), [8], meta(2, 1), meta(2, 1), None, None, [True, False, False]), {}),
    ),
    "in place": (aten.add_.Tensor, lambda: ((meta(3, 4), meta(4)), {})),
    "into an output": (aten.addcmul.out, lambda: ((meta(3), meta(3), meta(3)), {"out": meta(3)})),
    "into an output of another size": (aten.add.out, lambda: ((meta(3), meta(3)), {"out": meta(0)})),
    "a view": (aten.view.default, lambda: ((meta(3, 4), [12]), {})),
    "a view that is not called one": (aten._unsafe_view.default, lambda: ((meta(3, 4), [12]), {})),
    "a list": (aten._foreach_add.Scalar, lambda: (([meta(3), meta(4)], 1.0), {})),
    "a copy to another dtype": (aten._to_copy.default, lambda: ((meta(3),), {"dtype": torch.bfloat16})),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_returns_what_the_operation_returns(name: str) -> None:
    func, make = CALLS[name]
    for _ in range(3):
        args, kwargs = make()
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        twin_args, twin_kwargs = make()
        twins = [each for each in (*twin_args, *twin_kwargs.values()) if isinstance(each, Tensor)]
        ours, theirs = run_on_meta(func, args, kwargs), func(*twin_args, **twin_kwargs)
        assert _described(ours, given) == _described(theirs, twins)


def _described(result: Any, inputs: list[Tensor]) -> list[object]:
    """Returns sizes and memory of outputs, and which inputs they share it with."""
    described: list[object] = [type(result)]
    for each in result if isinstance(result, (tuple, list)) else (result,):
        if not isinstance(each, Tensor):
            described.append(each)
            continue
        shared = [index for index, tensor in enumerate(inputs) if storage(tensor) == storage(each)]
        same = [index for index, tensor in enumerate(inputs) if tensor is each]
        size = (each.shape, each.stride(), each.dtype, each.device, each.untyped_storage().nbytes())
        described.append((size, shared, same))
    return described


def test_numbers_of_other_types_and_other_strides_are_other_calls() -> None:
    ints = meta(2, 3, dtype=torch.int64)
    results = [run_on_meta(aten.add.Tensor, (ints, other), {}) for other in (1, 1.0, True)]
    assert [each.dtype for each in results] == [torch.int64, torch.float32, torch.int64]
    straight, turned = (run_on_meta(aten.neg.default, (each,), {}) for each in (meta(3, 3), meta(3, 3).t()))
    assert straight.stride() != turned.stride()


def test_tensors_with_values_are_computed() -> None:
    for value in (1.0, 2.0):
        assert run_on_meta(aten.neg.default, (torch.tensor(value),), {}) == -value
    on_meta = run_on_meta(aten._to_copy.default, (torch.ones(2),), {"device": torch.device("meta")})
    assert on_meta.is_meta


def test_meters_within_meters_all_count() -> None:
    x, totals = meta(4, 8), set()
    for _ in range(2):
        with FlopMeter() as outer, FlopMeter() as inner:
            x @ x.t()
        totals |= {outer.total, inner.total}
    assert totals == {2 * 4 * 4 * 8}
