"""Slices sink through matrix products, reductions and convolution backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.passes.joint import Joint, Refusal, assert_sunk, check, count, joint, refused

aten = torch.ops.aten
f64 = torch.float64


def _randn(*sizes: int, dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(sizes, dtype=dtype)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda w, x: functional.linear(x, w), (7, 11), (5, 11)),
    "linear_3d": (lambda w, x: functional.linear(x, w), (7, 11), (5, 2, 11)),
    "linear_4d": (lambda w, x: functional.linear(x, w), (7, 11), (5, 2, 3, 11)),
    "matmul": (lambda w, x: x @ w, (7, 11), (5, 7)),
    "matmul_from_left": (lambda w, x: w @ x, (7, 11), (11, 5)),
    "addmm": (lambda w, x: torch.addmm(x[:, :1], x, w), (7, 11), (5, 7)),
    "bmm": (lambda w, x: torch.bmm(x, w), (3, 7, 11), (3, 5, 7)),
    "batched_matmul": (lambda w, x: torch.matmul(x, w), (3, 7, 11), (2, 3, 5, 7)),
    "baddbmm": (lambda w, x: torch.baddbmm(x[:, :, :1], x, w), (3, 7, 11), (3, 5, 7)),
    "einsum": (lambda w, x: torch.einsum("bi,ihd->bhd", x, w), (7, 3, 11), (5, 7)),
    "heads": (lambda w, x: torch.einsum("bi,hid->bhd", x, w), (3, 7, 11), (5, 7)),
    "outer": (lambda w, x: torch.outer(w, x).sin(), (7,), (5,)),
    "dot": (lambda w, x: (w * x).sum(-1).exp(), (7, 11), (5, 7, 11)),
    "mean": (lambda w, x: (w * x).mean(0), (7, 11), (5, 7, 11)),
    "chained": (lambda w, x: functional.linear(x, functional.silu(w * 2)).tanh(), (7, 11), (5, 11)),
    "reduced_weight": (lambda w, x: x * w.sum(1), (7, 11), (5, 7)),
    "averaged_weight": (lambda w, x: x * w.mean(0, keepdim=True), (7, 11), (5, 11)),
}
# Along these dimensions a slice lies in pieces in the operand of the product.
INNER = {("einsum", 2), ("heads", 2)}
CASES = [
    pytest.param(f, w, x, dim, id=f"{name}-{dim}")
    for name, (f, w, x) in PRODUCTS.items()
    for dim in range(len(w))
    if (name, dim) not in INNER
]


@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize(("function", "weight", "x", "dim"), CASES)
def test_slice_sinks_through_product(
    function: Callable[..., Tensor], weight: tuple[int, ...], x: tuple[int, ...], dim: int, inductor: bool
) -> None:
    values = _randn(*weight)
    case = joint(function, [values], [_randn(*x)], inductor=inductor)
    assert_sunk(check(case, (dim, 1, 2)), values.numel())


@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize("dim", [0, 1])
def test_slice_with_symbolic_tokens(dim: int, inductor: bool) -> None:
    """Batch and length are symbolic: rules compare sizes without guards, and the graph serves other sizes."""
    weight, bias = _randn(7, 11), _randn(7)
    x, scale = _randn(3, 5, 11), _randn(7)

    def function(w: Tensor, b: Tensor, x: Tensor, s: Tensor) -> Tensor:
        return functional.gelu(functional.linear(x, w, b)) * s

    case = joint(function, [weight, bias], [x, scale], inductor=inductor, dynamic={2: (0, 1)})
    region = check(case, (dim, 2, 3), (0, 1, 4))
    assert_sunk(region, weight.numel())
    longer = Joint(case.region, function, (weight, bias, _randn(2, 9, 11), scale), 2, _randn(2, 9, 7))
    sizes = [n for n in region.placeholders("primal") if isinstance(n.meta["val"], torch.SymInt)]
    assert sizes == []
    found = longer.run(region, [2, 1])
    for value, gradient, cut in zip(found[1:], longer.dense(), [(dim, 2, 3), (0, 1, 4)], strict=True):
        torch.testing.assert_close(value, gradient.narrow(*cut), rtol=1e-9, atol=1e-12)


def test_product_of_weight_gradient_shrinks() -> None:
    """The one product of the backward has the rows of the slice."""
    case = joint(PRODUCTS["linear"][0], [_randn(64, 11)], [_randn(5, 11)])
    region = check(case, (0, 16, 8))
    backward = list(region.graph.find_nodes(op="call_function", target=aten.mm.default))[1:]
    assert [tuple(n.meta["val"].shape) for n in backward] == [(8, 11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    weight, x = _randn(7, 11, dtype=dtype), _randn(5, 11, dtype=dtype)
    case = joint(PRODUCTS["linear"][0], [weight], [x])
    assert_sunk(check(case, (0, 1, 3), tolerance=2 * torch.finfo(dtype).eps), weight.numel())


def test_slice_sinks_into_the_gradient_above() -> None:
    """If nobody needs the gradient of an activation whole, the slice goes on and shrinks the product above it."""
    up, down = _randn(13, 11), _randn(3, 13)

    def function(u: Tensor, d: Tensor, x: Tensor) -> Tensor:
        return functional.linear(functional.silu(functional.linear(x, u)), d)

    case = joint(function, [up, down], [_randn(5, 11)])
    region = check(case, (0, 2, 4), None)
    products = region.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert [tuple(n.meta["val"].shape) for n in products[2:]] == [(5, 4), (4, 11)]


def test_slice_stops_where_the_whole_is_needed() -> None:
    """The gradient of an activation that a lower layer needs whole is computed once, and sliced for free."""
    first, second = _randn(13, 11), _randn(3, 13)

    def function(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        hidden = functional.linear(x, a).tanh()
        return functional.linear(hidden, b).tanh()

    case = joint(function, [first, second], [_randn(5, 11)])
    region = check(case, "whole", (1, 3, 2))
    assert region.dense == []
    assert count(region, aten.tanh_backward.default) == 2


def test_gradient_that_is_needed_whole_anyway_is_not_reported() -> None:
    bias, weight = _randn(5, 11), _randn(7, 11)

    def function(b: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return functional.linear((x + b).tanh(), w)

    case = joint(function, [bias, weight], [_randn(5, 11)])
    region = check(case, (0, 1, 2), "whole")
    assert region.dense == []


def test_tied_weight_is_sliced_on_both_paths() -> None:
    weight = _randn(17, 11)
    tokens = torch.randint(0, 17, (2, 5))
    case = joint(lambda w, t: functional.linear(functional.embedding(t, w).tanh(), w), [weight], [tokens])
    assert_sunk(check(case, (0, 3, 6)), weight.numel())
    assert_sunk(check(case, (1, 3, 6)), weight.numel())


def test_equal_slices_are_shared() -> None:
    """``w * w`` has two equal gradient terms; the slice of what both read is taken once."""
    case = joint(lambda w, x: (w * w) * x, [_randn(5, 7)], [_randn(13, 5, 7)])
    region = check(case, (0, 1, 2))
    narrows = region.graph.find_nodes(op="call_function", target=torch.ops.chunkft_fx.narrow.default)
    assert len({n.args for n in narrows}) == len(narrows)
    assert count(region, aten.sum.dim_IntList) == 1


@settings(max_examples=40)
@given(st.data())
def test_random_linear(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.integers(1, 6)
    rows, columns, lead = draw(sizes), draw(sizes), draw(st.lists(sizes, max_size=3))
    has_bias = draw(st.booleans())
    weights = [_randn(rows, columns)] + ([_randn(rows)] if has_bias else [])
    case = joint(lambda *v: functional.linear(v[-1], *v[:-1]), weights, [_randn(*lead, columns)])
    asked: list[Any] = [_cut(draw, weights[0])]
    if has_bias:
        asked.append(draw(st.sampled_from(["whole", None, _cut(draw, weights[1])])))
    check(case, *asked)


def _cut(draw: Any, weight: Tensor) -> tuple[int, int, int]:
    dim = draw(st.integers(0, weight.ndim - 1))
    length = draw(st.integers(1, weight.shape[dim]))
    return dim, draw(st.integers(0, weight.shape[dim] - length)), length


@settings(max_examples=50)
@given(st.data())
def test_random_convolution(data: st.DataObject) -> None:
    """Convolutions of one to three dimensions, plain and transposed: output and input channels, and the bias."""
    draw = data.draw
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    few = st.integers(1, 4)
    sizes = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1)), "dilation": draw(st.integers(1, 2))}
    weight = _randn(draw(few), draw(few), *[draw(st.integers(1, 3)) for _ in range(rank)])
    outputs, inputs = weight.shape[:2] if not transposed else weight.shape[1::-1]
    x = _randn(draw(st.integers(1, 2)), inputs, *[draw(st.integers(5, 7)) for _ in range(rank)])
    name = f"conv{'_transpose' if transposed else ''}{rank}d"
    operator = getattr(functional, name)
    case = joint(lambda w, b, x: operator(x, w, b, **sizes), [weight, _randn(outputs)], [x])
    dim = draw(st.integers(0, 1))
    length = draw(st.integers(1, weight.shape[dim]))
    start = draw(st.integers(0, weight.shape[dim] - length))
    bias = draw(st.integers(1, outputs))
    assert check(case, (dim, start, length), (0, outputs - bias, bias)).dense == []


@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose2d"])
def test_convolution_sinks(name: str, dim: int, inductor: bool) -> None:
    rank = int(name[-2])
    weight = _randn(6, 4, *[3] * rank)
    x = _randn(2, 6 if "transpose" in name else 4, *[7] * rank)
    operator = getattr(functional, name)
    case = joint(lambda w, x: operator(x, w, padding=1), [weight], [x], inductor=inductor)
    assert_sunk(check(case, (dim, 1, 2)), weight.numel())


def test_convolution_below_another_computes_only_what_is_asked() -> None:
    """The input gradient that the lower layer needs stays; the sliced weight gradient is a convolution of its own."""
    first, second = _randn(6, 3, 3, 3), _randn(8, 6, 3, 3)
    case = joint(
        lambda a, b, x: functional.conv2d(functional.conv2d(x, a).tanh(), b), [first, second], [_randn(2, 3, 9, 9)]
    )
    region = check(case, (0, 2, 3), (0, 1, 4))
    masks = [n.args[10] for n in region.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)]
    assert sorted(map(str, masks)) == [
        "[False, True, False]",
        "[False, True, False]",
        "[True, False, False]",
    ]


def test_undemanded_convolution_weight_is_not_computed() -> None:
    first, second = _randn(6, 3, 3, 3), _randn(8, 6, 3, 3)
    case = joint(
        lambda a, b, x: functional.conv2d(functional.conv2d(x, a).tanh(), b), [first, second], [_randn(2, 3, 9, 9)]
    )
    region = check(case, "whole", None)
    masks = [n.args[10] for n in region.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)]
    assert masks == [[True, False, False], [False, True, False]]


def _convolution(groups: int = 1) -> tuple[Any, ...]:
    """Arguments of convolution_backward: 4 to 6 channels, kernels of 3 x 3."""
    tensors = (_randn(2, 6, 7, 7), _randn(2, 4, 9, 9), _randn(6, 4 // groups, 3, 3))
    return (*tensors, [6], [1, 1], [0, 0], [1, 1], False, [0, 0], groups, [True, True, True])


REFUSALS: dict[str, Refusal] = {
    "sum_over_every_dimension": (
        0, aten.sum.dim_IntList, (_randn(5, 7), [], True), None, "the operator sums over every dimension",
    ),
    "sum_along_the_cut": (
        0, aten.sum.dim_IntList, (_randn(5, 7), [0], True), None,
        "the cut dimension is one that the operator sums over",
    ),
    "input_gradient_of_a_convolution": (
        1, aten.convolution_backward.default, _convolution(), 0,
        "the cut value is the gradient of the convolution's input",
    ),
    "grouped_convolution": (
        0, aten.convolution_backward.default, _convolution(groups=2), 1, "the convolution is grouped",
    ),
    "kernel_positions_of_a_convolution": (
        2, aten.convolution_backward.default, _convolution(), 1,
        "the cut dimension runs over positions of the convolution's kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "target", "args", "result", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(dim: int, target: Any, args: tuple[Any, ...], result: int | None, reason: str) -> None:
    assert refused(dim, target, *args, result=result).reason == reason


def test_grouped_convolution_stays_exact() -> None:
    case = joint(lambda w, x: functional.conv2d(x, w, groups=2), [_randn(6, 2, 3, 3)], [_randn(2, 4, 9, 9)])
    region = check(case, (0, 2, 3))
    (dense,) = region.dense
    assert (dense.op, dense.reason) == ("aten.convolution_backward.default", "the convolution is grouped")


def test_kernel_positions_of_a_convolution_stay_exact() -> None:
    case = joint(lambda w, x: functional.conv2d(x, w), [_randn(6, 2, 3, 3)], [_randn(2, 2, 9, 9)])
    region = check(case, (2, 1, 2))
    assert [(d.op, d.nbytes) for d in region.dense] == [("aten.convolution_backward.default", 6 * 2 * 9 * 8)]


@pytest.mark.parametrize(("name", "dim"), sorted(INNER))
def test_refuses_inner_part_of_a_product(name: str, dim: int) -> None:
    function, weight, x = PRODUCTS[name]
    region = check(joint(function, [_randn(*weight)], [_randn(*x)]), (dim, 1, 2))
    assert [d.op for d in region.dense] == ["aten.view.default"]


def test_refuses_running_sum() -> None:
    """A running sum along the cut needs everything behind it."""
    case = joint(lambda w, x: w.cumsum(0) * x, [_randn(5, 7)], [_randn(13, 5, 7)])
    assert [d.op for d in check(case, (0, 1, 2)).dense] == ["aten.flip.default"]
