"""canonicalize: equal meaning to the bit and to the stride, in one spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.passes import Canonicalize
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import Joint, count, joint

aten = torch.ops.aten
WEIGHT = (4, 3, 5)

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "t": (lambda w: w[0].t() * 2, aten.t.default),
    "t_of_vector": (lambda w: w[0, 0].t() * 2, aten.t.default),
    "transpose": (lambda w: w.transpose(0, -1) * 2, aten.transpose.int),
    "unsafe_view": (lambda w: functional.linear(w, w[0]), aten._unsafe_view.default),
    "detach": (lambda w: w.tanh(), aten.detach.default),
    "alias": (lambda w: torch.ops.aten.alias(w) * 2, aten.alias.default),
}


def _case(function: Callable[[Tensor], Tensor]) -> Joint:
    return joint(function, [torch.randn(WEIGHT)])


def _assert_bitwise(case: Joint) -> None:
    region = case.region.copy()
    before, strides = case.run(region), [n.meta["val"].stride() for n in region.outputs if n is not None]
    over_region(region, [Canonicalize()])
    after = case.run(region)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(before, after, strict=True))
    assert strides == [n.meta["val"].stride() for n in region.outputs if n is not None]


@pytest.mark.parametrize(("function", "operator"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_spelling_is_replaced(function: Callable[[Tensor], Tensor], operator: Any) -> None:
    case = _case(function)
    assert count(case.region, operator) > 0
    region = case.region.copy()
    assert over_region(region, [Canonicalize()])["canonicalize"] > 0
    assert count(region, operator) == 0
    _assert_bitwise(case)


DIMS: dict[str, Callable[[Tensor], Tensor]] = {
    "permute": lambda w: w.permute(-1, 0, -2) * 2,
    "sum": lambda w: w.sum((-1, 0)),
    "mean": lambda w: w.mean((-2,), keepdim=True),
    "cat": lambda w: torch.cat([w, w], -2),
    "slice": lambda w: torch.ops.aten.slice.Tensor(w, -2, 1, 3) * 2,
    "select": lambda w: torch.ops.aten.select.int(w, -1, 2) * 2,
    "unsqueeze": lambda w: torch.ops.aten.unsqueeze(w, -1) * 2,
    "unsqueeze_front": lambda w: torch.ops.aten.unsqueeze(w, -4) * 2,
    "squeeze": lambda w: torch.ops.aten.squeeze.dim(w[:, :1] * 2, -2) * 2,
    "squeeze_dims": lambda w: torch.ops.aten.squeeze.dims(w[:, :1, :1] * 2, [-2, -1]) * 2,
}


@pytest.mark.parametrize("function", DIMS.values(), ids=DIMS)
def test_dimensions_become_positive(function: Callable[[Tensor], Tensor]) -> None:
    case = _case(function)
    region = case.region.copy()
    assert over_region(region, [Canonicalize()])["canonicalize"] > 0
    for node in region.graph.nodes:
        dims = node.args[1] if node.target in _DIM_OPERATORS else ()
        assert all(d >= 0 for d in ([dims] if isinstance(dims, int) else dims))
    _assert_bitwise(case)


_DIM_OPERATORS = {
    aten.permute.default, aten.sum.dim_IntList, aten.mean.dim, aten.cat.default, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip


@settings(max_examples=30)
@given(st.data())
def test_random_layouts_stay_to_the_bit(data: st.DataObject) -> None:
    draw = data.draw
    rank = draw(st.integers(1, 4))
    weight = torch.randn([draw(st.integers(1, 4)) for _ in range(rank)])
    pairs = draw(
        st.lists(st.tuples(st.integers(-rank, rank - 1), st.integers(-rank, rank - 1)), min_size=1, max_size=3)
    )

    def function(w: Tensor) -> Tensor:
        for a, b in pairs:
            w = w.transpose(a, b).tanh()
        return w

    _assert_bitwise(joint(function, [weight]))


def test_second_run_finds_nothing() -> None:
    region = _case(lambda w: functional.linear(w, w[0].tanh())).region.copy()
    assert Canonicalize()(region) > 0
    assert Canonicalize()(region) == 0


def test_refuses_to_change_other_operators() -> None:
    """What has one spelling stays: views, dimensions that are positive or left out."""
    case = _case(lambda w: torch.cat([w.sum((0, 1)), w.permute(2, 1, 0).sum((1, 2))]).view(2, 5))
    region = case.region.copy()
    assert Canonicalize()(region) == 0
