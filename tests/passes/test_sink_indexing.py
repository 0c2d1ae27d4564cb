"""Slices sink through operators that add rows at given places, or take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional

from chunkft_fx.passes.sink_rules import RULES, Cut, Refused, Rule
from chunkft_fx.passes.sink_rules.indexing import index
from tests.passes.joint import Refusal, assert_sunk, check, joint, refused

aten = torch.ops.aten
FORMS = pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])


def _randn(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


@settings(max_examples=80)
@given(st.data())
def test_random_embedding(data: st.DataObject) -> None:
    """Rows and columns, repeated tokens, padding rows inside and outside of the slice, scaling by frequency."""
    draw = data.draw
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    tokens = torch.randint(0, rows, draw(st.sampled_from([(6,), (2, 5), (2, 1, 3)])))
    padding = draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))
    by_frequency = draw(st.booleans())

    def function(w: Tensor, t: Tensor) -> Tensor:
        return functional.embedding(t, w, padding_idx=padding, scale_grad_by_freq=by_frequency)

    case = joint(function, [_randn(rows, width)], [tokens], inductor=draw(st.booleans()))
    dim = draw(st.integers(0, 1))
    size = (rows, width)[dim]
    length = draw(st.integers(1, size))
    region = check(case, (dim, draw(st.integers(0, size - length)), length))
    assert region.dense == []


@FORMS
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("padding", [None, 0, 4, 16])
@pytest.mark.parametrize("dim", [0, 1])
def test_embedding_sinks(dim: int, padding: int | None, by_frequency: bool, inductor: bool) -> None:
    weight, tokens = _randn(17, 11), torch.randint(0, 17, (3, 7))
    tokens[0, :4] = 4

    def function(w: Tensor, t: Tensor) -> Tensor:
        return functional.embedding(t, w, padding_idx=padding, scale_grad_by_freq=by_frequency)

    assert_sunk(check(joint(function, [weight], [tokens], inductor=inductor), (dim, 3, 6)), weight.numel())


def test_embedding_with_32_bit_tokens() -> None:
    weight, tokens = _randn(17, 11), torch.randint(0, 17, (3, 7), dtype=torch.int32)
    assert_sunk(check(joint(lambda w, t: functional.embedding(t, w), [weight], [tokens]), (0, 3, 6)), weight.numel())


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype, inductor: bool) -> None:
    weight = _randn(17, 11).to(dtype)
    tokens = torch.randperm(17)[:15].view(3, 5)
    case = joint(lambda w, t: functional.embedding(t, w), [weight], [tokens], inductor=inductor)
    assert_sunk(check(case, (0, 3, 6), tolerance=torch.finfo(dtype).eps), weight.numel())


@FORMS
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_indexing_sinks(dim: int, inductor: bool) -> None:
    """``weight[places]``; negative places count from the end."""
    weight, places = _randn(7, 5, 3), torch.tensor([[0, -1, 3], [3, -7, 6]])
    case = joint(lambda w, p: w[p], [weight], [places], inductor=inductor)
    assert_sunk(check(case, (dim, 1, 2)), weight.numel())


@FORMS
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_indexing_of_a_later_dimension_sinks(dim: int, inductor: bool) -> None:
    weight, places = _randn(7, 5, 3), torch.tensor([[0, -1, 3], [3, -5, 2]])
    case = joint(lambda w, p: w[:, p], [weight], [places], inductor=inductor)
    assert_sunk(check(case, (dim, 1, 2)), weight.numel())


@FORMS
@pytest.mark.parametrize("dim", [0, 1])
def test_relative_bias_table_sinks(dim: int, inductor: bool) -> None:
    """A table of biases by distance, as in T5: looked up, permuted and added to all scores of a batch."""
    table, distance = _randn(16, 3), torch.randint(0, 16, (5, 5))
    scores = _randn(2, 3, 5, 5)

    def function(w: Tensor, d: Tensor, s: Tensor) -> Tensor:
        return (s + functional.embedding(d, w).permute(2, 0, 1).unsqueeze(0)).softmax(-1)

    case = joint(function, [table], [distance, scores], inductor=inductor)
    assert_sunk(check(case, (dim, 1, 2)), table.numel())


@pytest.mark.parametrize("gather_dim", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_gather(dim: int, gather_dim: int) -> None:
    weight = _randn(7, 5)
    places = torch.randint(0, weight.shape[gather_dim], (7, 5))
    case = joint(lambda w, p: w.gather(gather_dim, p).tanh(), [weight], [places])
    region = check(case, (dim, 1, 3))
    assert region.dense == []
    made = [
        n.meta["val"] for n in region.graph.find_nodes(op="call_function", target=torch.ops.aten.scatter_add.default)
    ]
    assert [v.shape[dim] for v in made] == [4 if dim == gather_dim else 3]


@FORMS
@pytest.mark.parametrize("select_dim", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_index_select_sinks(dim: int, select_dim: int, inductor: bool) -> None:
    weight, places = _randn(7, 5), torch.tensor([0, 3, 3, 1])
    case = joint(lambda w, p: w.index_select(select_dim, p).tanh(), [weight], [places], inductor=inductor)
    assert_sunk(check(case, (dim, 1, 3)), weight.numel())


@settings(max_examples=60)
@given(st.data())
def test_random_places_of_a_gradient(data: st.DataObject) -> None:
    """The gradient of rows put at places is read at these places, of any rank and sign, once or repeatedly."""
    draw = data.draw
    sizes = draw(st.lists(st.integers(2, 4), min_size=2, max_size=3))
    where = draw(st.integers(0, len(sizes) - 1))
    shape = draw(st.sampled_from([(), (3,), (2, 2)]))
    places = torch.randint(-sizes[where], sizes[where], shape)
    weight = _randn(*sizes[:where], *shape, *sizes[where + 1 :])

    def function(w: Tensor, base: Tensor, p: Tensor, x: Tensor) -> Tensor:
        return aten.index_put(base, [*[None] * where, p], w, True) * x

    inputs = [_randn(*sizes), places, _randn(13, *sizes)]
    case = joint(function, [weight], inputs, inductor=draw(st.booleans()))
    dim = draw(st.integers(0, weight.ndim - 1))
    length = draw(st.integers(1, weight.shape[dim]))
    region = check(case, (dim, draw(st.integers(0, weight.shape[dim] - length)), length))
    if where <= dim < where + len(shape):
        assert [d.op for d in region.dense] == ["aten.index.Tensor"]
    else:
        assert region.dense == []


@FORMS
@pytest.mark.parametrize("dim", [0, 3])
def test_gradient_at_places_sinks(dim: int, inductor: bool) -> None:
    """Along dimensions in front of the places and behind them."""
    weight, places = _randn(7, 2, 3, 5), torch.tensor([[0, -1, 3], [3, -4, 2]])
    case = joint(
        lambda w, b, p, x: aten.index_put(b, [None, p], w, True) * x,
        [weight],
        [_randn(7, 4, 5), places, _randn(13, 7, 4, 5)],
        inductor=inductor,
    )
    assert_sunk(check(case, (dim, 1, 2)), weight.numel())


_PLACE, _MASK, _ROWS = torch.tensor([0, 3, 3, 8]), torch.tensor([True, False, True, True]), _randn(4, 5)
_MASKED = aten._unsafe_masked_index_put_accumulate.default
_SEVERAL = "several dimensions are indexed at once"
_FEWER = "the added values have fewer dimensions than their places"
_BROADCAST = "the added values are broadcast along the cut dimension"
REFUSALS: dict[str, Refusal] = {
    "index_put_that_replaces": (
        0, aten.index_put.default, (_randn(9, 5), [_PLACE], _ROWS), None,
        "the operator replaces values instead of adding to them",
    ),
    "two_index_tensors": (
        0, aten.index_put.default, (_randn(9, 5), [_PLACE, _PLACE % 5], _randn(4), True), None, _SEVERAL,
    ),
    "two_index_tensors_with_a_mask": (
        0, _MASKED, (_randn(9, 5), _MASK, [_PLACE, _PLACE % 5], _randn(4)), None, _SEVERAL,
    ),
    "mask_as_index": (
        1, aten.index_put.default, (_randn(4, 5), [_MASK], _randn(3, 5), True), None, "the index is a mask",
    ),
    "values_with_fewer_dimensions": (
        0, aten.index_put.default, (_randn(9, 5), [_PLACE], _randn(5), True), None, _FEWER,
    ),
    "values_broadcast_along_the_cut": (
        1, aten.index_put.default, (_randn(9, 5), [_PLACE], _randn(4, 1), True), None, _BROADCAST,
    ),
    "masked_values_broadcast_along_the_cut": (
        1, _MASKED, (_randn(9, 5), _MASK.unsqueeze(1), [_PLACE], _randn(4, 1)), None, _BROADCAST,
    ),
    "taken_with_two_index_tensors": (
        1, aten.index.Tensor, (_randn(9, 5, 3), [_PLACE, _PLACE % 5]), None, _SEVERAL,
    ),
    "taken_along_the_cut": (
        1, aten.index.Tensor, (_randn(5, 9), [None, _PLACE]), None,
        "the cut dimension is one of the index tensor, which may name any indices",
    ),
    "scatter_to_a_part_of_the_cut": (
        0, aten.scatter_add.default, (_randn(7, 5), 1, torch.zeros(3, 5, dtype=torch.int64), _randn(3, 5)), None,
        "values are added to a part of the cut dimension only",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "target", "args", "result", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(dim: int, target: Any, args: tuple[Any, ...], result: int | None, reason: str) -> None:
    assert refused(dim, target, *args, result=result).reason == reason


def test_two_index_tensors_stay_exact() -> None:
    weight, a, b = _randn(7, 5), torch.tensor([0, 3, 6]), torch.tensor([1, 1, 4])
    region = check(joint(lambda w, a, b: w[a, b].tanh(), [weight], [a, b]), (0, 1, 3))
    assert [d.op for d in region.dense] == ["aten.index_put.default"]


def test_refuses_a_gradient_at_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows a mask takes is known at run time only. They are summed here, so that nothing is reported dense."""
    weight, mask = _randn(5), torch.tensor([True, False, True, True])
    inputs = [_randn(4, 5), mask, _randn(13, 4, 5)]
    case = joint(lambda w, b, m, x: aten.index_put(b, [m], w, True) * x, [weight], inputs)
    reasons = []

    def recorded(cut: Cut, node: fx.Node) -> fx.Node:
        with pytest.raises(Refused) as refusal:
            index(cut, node)
        reasons.append(refusal.value.reason)
        raise refusal.value

    monkeypatch.setitem(RULES, aten.index.Tensor, Rule(recorded, contracts=False))
    check(case, (0, 1, 3))
    assert reasons == ["the index is a mask"]


def test_stays_exact_in_gather_of_a_part_along_the_cut() -> None:
    """Where only some rows are gathered, a slice of the places need not exist."""
    weight, places = _randn(7, 5), torch.randint(0, 5, (3, 5))
    region = check(joint(lambda w, p: w.gather(1, p).tanh(), [weight], [places]), (0, 1, 3))
    assert [d.op for d in region.dense] == ["aten.scatter_add.default"]
