"""sink_slices as a whole: random functions of a weight, every slice of whose gradient must stay exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.passes import Canonicalize, SelectSlices, SinkSlices
from tests.passes.joint import check, count, demands, joint

# From a value and the further inputs drawn so far to the next value.
Step = Callable[[Tensor, Sequence[Tensor]], Tensor]
aten = torch.ops.aten


def _randn(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


def _dims(draw: Any, shape: torch.Size) -> int:
    return int(draw(st.integers(-len(shape), len(shape) - 1)))


def _input(inputs: list[Tensor], value: Tensor) -> int:
    inputs.append(value)
    return len(inputs) - 1


def _permute(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    order = draw(st.permutations(range(len(shape))))
    return lambda y, _: y.permute(order)


def _transpose(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    a, b = _dims(draw, shape), _dims(draw, shape)
    return lambda y, _: y.transpose(a, b)


def _unsqueeze(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = draw(st.integers(-len(shape) - 1, len(shape)))
    return lambda y, _: y.unsqueeze(dim)


def _squeeze(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = _dims(draw, shape)
    return lambda y, _: y.squeeze(dim)


def _merge(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = draw(st.integers(0, max(len(shape) - 2, 0)))
    return lambda y, _: y.flatten(dim, min(dim + 1, len(shape) - 1))


def _split(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = draw(st.integers(0, len(shape) - 1))
    outer = draw(st.sampled_from([d for d in (1, 2, 3, shape[dim]) if shape[dim] % d == 0]))
    return lambda y, _: y.unflatten(dim, (outer, shape[dim] // outer))


def _expand(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    sizes = [draw(st.integers(1, 3)), *(draw(st.sampled_from([s, -1])) if s > 1 else 2 for s in shape)]
    return lambda y, _: y.expand(sizes)


def _binary(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    operator = draw(st.sampled_from([torch.add, torch.sub, torch.mul, torch.maximum, torch.atan2]))
    other = _randn(*[draw(st.sampled_from([1, s])) for s in shape])
    dropped = draw(st.integers(0, other.ndim))
    other = other[(0,) * dropped] if all(s == 1 for s in other.shape[:dropped]) else other
    index = _input(inputs, other)
    return lambda y, values: operator(y, values[index])


def _unary(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    function = draw(
        st.sampled_from(
            [torch.tanh, torch.sigmoid, functional.gelu, functional.silu, torch.relu, torch.neg, torch.sin,
             lambda y: 2 - y, lambda y: y / 3, lambda y: y.abs() ** 1.5, lambda y: torch.where(y > 0, y, 3 * y)]
        )
    )  # fmt: skip
    return lambda y, _: function(y)


def _cat(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim, is_first = _dims(draw, shape), draw(st.booleans())
    sizes = list(shape)
    sizes[dim] = draw(st.integers(1, 2))
    index = _input(inputs, _randn(*sizes))
    return lambda y, values: torch.cat([y, values[index]] if is_first else [values[index], y], dim)


def _slice(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    step = draw(st.integers(1, 2))
    index = (slice(None),) * dim + (slice(start, None, step),)
    return lambda y, _: y[index]


def _select(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = draw(st.integers(0, len(shape) - 1))
    index = draw(st.integers(-shape[dim], shape[dim] - 1))
    return (lambda y, _: y.select(dim, index)) if len(shape) > 1 else (lambda y, _: -y)


def _pad(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    pad = [draw(st.integers(0, 2)) for _ in range(2 * draw(st.integers(1, len(shape))))]
    return lambda y, _: functional.pad(y, pad)


def _reduce(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim, keepdim, average = _dims(draw, shape), draw(st.booleans()) or len(shape) == 1, draw(st.booleans())
    return lambda y, _: y.mean(dim, keepdim) if average else y.sum(dim, keepdim)


def _copy(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    dim = _dims(draw, shape)
    return lambda y, _: y.transpose(0, dim).contiguous()


def _matmul(draw: Any, shape: torch.Size, inputs: list[Tensor]) -> Step:
    index = _input(inputs, _randn(shape[-1], draw(st.integers(1, 4))))
    return lambda y, values: y @ values[index]


STEPS = (
    _permute, _transpose, _unsqueeze, _squeeze, _merge, _split, _expand, _binary, _unary, _cat, _slice, _select, _pad,
    _reduce, _copy, _matmul,
)  # fmt: skip


@settings(max_examples=150)
@given(st.data())
def test_random_functions_of_a_weight(data: st.DataObject) -> None:
    """Whatever sinks, and whatever is refused on the way: each slice equals autograd's."""
    draw = data.draw
    weight = _randn(*draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    steps: list[Step] = []
    inputs: list[Tensor] = []
    y = weight
    for make in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5)):
        steps.append(make(draw, y.shape, inputs))
        y = steps[-1](y, inputs)
        if y.ndim in (0, 6) or y.numel() > 2000:
            break

    def function(w: Tensor, x: Tensor, *values: Tensor) -> Tensor:
        for step in steps:
            w = step(w, values)
        return w * x

    case = joint(function, [weight], [_randn(2, *y.shape), *inputs], inductor=draw(st.booleans()))
    dim = draw(st.integers(0, weight.ndim - 1))
    length = draw(st.integers(1, weight.shape[dim]))
    check(case, (dim, draw(st.integers(0, weight.shape[dim] - length)), length))


@settings(max_examples=25)
@given(st.data())
def test_random_demands_on_a_network(data: st.DataObject) -> None:
    """Slices, whole gradients and none of them in one graph, with an embedding tied to the output."""
    draw = data.draw
    table, up, down, gain = _randn(9, 4), _randn(6, 4), _randn(4, 6), _randn(4)
    tokens = torch.randint(0, 9, (2, 5))

    def function(e: Tensor, u: Tensor, d: Tensor, g: Tensor, t: Tensor) -> Tensor:
        x = functional.embedding(t, e)
        hidden = functional.silu(functional.linear(x * g, u))
        return functional.linear(x + functional.linear(hidden, d), e)

    weights = [table, up, down, gain]
    asked: list[Any] = []
    for weight in weights:
        dim = draw(st.integers(0, weight.ndim - 1))
        length = draw(st.integers(1, weight.shape[dim]))
        cut = (dim, draw(st.integers(0, weight.shape[dim] - length)), length)
        asked.append(draw(st.sampled_from([None, "whole", cut, cut])))
    case = joint(function, weights, [tokens], inductor=draw(st.booleans()))
    assert check(case, *asked).dense == []


def test_sliced_values_are_contiguous_enough_for_views() -> None:
    """A slice that sinks below a transposition changes strides; views above it must still hold."""
    weight, x = _randn(6, 8), _randn(13, 4, 2, 6)
    case = joint(lambda w, x: w.t().contiguous().view(4, 2, 6) * x, [weight], [x])
    region = check(case, (0, 1, 4))
    assert region.dense == []


def test_number_of_rewrites_is_returned() -> None:
    case = joint(lambda w, x: functional.linear(x, w), [_randn(7, 11)], [_randn(5, 11)])
    region = case.region.copy()
    Canonicalize()(region)
    assert SinkSlices()(region) == 0
    SelectSlices(demands([(0, 1, 2)]))(region)
    assert SinkSlices()(region) > 0


def test_what_is_sunk_leaves_no_dense_operator_behind() -> None:
    """The dense product is gone right after the pass, without eliminate."""
    case = joint(lambda w, x: functional.linear(x, w), [_randn(7, 11)], [_randn(5, 11)])
    region = case.region.copy()
    Canonicalize()(region)
    SelectSlices(demands([(0, 1, 2)]))(region)
    before = count(region, aten.mm.default)
    SinkSlices()(region)
    assert count(region, aten.mm.default) == before == 2
