"""select_slices: the meaning of a chunk, right on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.passes import SelectSlices
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import Joint, demands, joint


def _case() -> Joint:
    weights = [torch.randn(7, 5), torch.randn(7), torch.randn(3, 7)]
    return joint(
        lambda a, b, c, x: functional.linear(functional.linear(x, a, b).tanh(), c), weights, [torch.randn(4, 5)]
    )


@settings(max_examples=30)
@given(st.data())
def test_outputs_are_the_demanded_parts_to_the_bit(data: st.DataObject) -> None:
    draw, case = data.draw, _case()
    dense = case.run(case.region.copy())
    asked: list[Any] = []
    for gradient in dense[1:]:
        dim = draw(st.integers(0, gradient.ndim - 1))
        length = draw(st.integers(1, gradient.shape[dim]))
        cut = (dim, draw(st.integers(0, gradient.shape[dim] - length)), length)
        asked.append(draw(st.sampled_from([None, "whole", cut])))
    region = case.region.copy()
    over_region(region, [SelectSlices(demands(asked))])
    found = case.run(region, [a[1] for a in asked if isinstance(a, tuple)])
    assert torch.equal(found[0], dense[0])
    for value, gradient, request in zip(found[1:], dense[1:], asked, strict=True):
        if request is None:
            assert value is None
        else:
            assert torch.equal(value, gradient.narrow(*request) if isinstance(request, tuple) else gradient)


def test_starts_are_placeholders_behind_all_others() -> None:
    region = _case().region.copy()
    assert SelectSlices(demands([(0, 1, 2), None, (1, 0, 4)]))(region) == 3
    starts = region.placeholders("start")
    assert [n.name for n in starts] == ["start_0", "start_2"]
    assert region.graph.find_nodes(op="placeholder")[-2:] == starts
    for node in starts:
        value = node.meta["val"]
        assert (value.shape, value.dtype, value.device.type) == ((), torch.int64, "cpu")
        assert node.meta["partitioner_tag"] == "is_backward"


def test_slice_follows_its_value_at_once() -> None:
    """The whole gradient can be freed before the rest of backward runs."""
    region = _case().region.copy()
    gradient = region.backward_outputs[2]
    assert gradient is not None
    SelectSlices(demands([(0, 0, 3), (0, 0, 3), (0, 0, 1)]))(region)
    assert gradient.next is region.backward_outputs[2]


def test_gradient_that_is_an_input_can_be_sliced() -> None:
    case = _case()
    region = case.region.copy()
    tangent = region.placeholders("tangent")[0]
    region.set_outputs((*region.outputs[:-1], tangent))
    over_region(region, [SelectSlices(demands([None, None, (1, 1, 2)]))])
    assert torch.equal(case.run(region, [1])[-1], case.tangent[:, 1:3])


def test_missing_gradient_stays_missing() -> None:
    region = _case().region.copy()
    region.set_outputs((*region.outputs[:-1], None))
    assert SelectSlices(demands(["whole", "whole", (0, 0, 1)]))(region) == 0
    assert region.placeholders("start") == []


def test_refuses_a_demand_of_another_length() -> None:
    with pytest.raises(ValueError, match="2 demands for 3 backward outputs"):
        SelectSlices(demands([None, "whole"]))(_case().region.copy())


def test_dtype_is_kept() -> None:
    case = joint(lambda w, x: x * w, [torch.randn(5, dtype=torch.bfloat16)], [torch.randn(3, 5, dtype=torch.bfloat16)])
    region = case.region.copy()
    over_region(region, [SelectSlices(demands([(0, 1, 2)]))])
    value: Tensor = case.run(region, [1])[1]
    assert (value.dtype, tuple(value.shape)) == (torch.bfloat16, (2,))
