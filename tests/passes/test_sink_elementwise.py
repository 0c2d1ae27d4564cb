"""Slices sink through elementwise operators, with broadcasting, and shrink constants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from chunkft_fx.passes.sink_rules import rule_for
from tests.passes.joint import assert_sunk, check, joint

Function = Callable[[Tensor], Tensor]

UNARY: dict[str, Function] = {
    "neg": torch.neg,
    "scale": lambda w: w * 2.5,
    "add_scalar": lambda w: w + 1,
    "rsub": lambda w: 3 - w,
    "div_scalar": lambda w: w / 3,
    "reciprocal": lambda w: 1 / (w.abs() + 1),
    "pow": lambda w: w.pow(3),
    "pow_exponent": lambda w: torch.pow(2.0, w),
    "square": lambda w: w * w,
    "sqrt": lambda w: (w.square() + 1).sqrt(),
    "rsqrt": lambda w: (w.square() + 1).rsqrt(),
    "exp": torch.exp,
    "log": lambda w: (w.abs() + 1).log(),
    "erf": torch.erf,
    "sin": torch.sin,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "gelu_tanh": lambda w: functional.gelu(w, approximate="tanh"),
    "silu": functional.silu,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "clamp": lambda w: w.clamp(-0.5, 0.5),
    "maximum": lambda w: torch.maximum(w, w.flip(1)),
    "masked_fill": lambda w: w.masked_fill(w > 0.3, 0.0),
    "where": lambda w: torch.where(w > 0, w, 2 * w),
}


@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize("function", UNARY.values(), ids=UNARY)
def test_slice_sinks_through_unary(function: Function, inductor: bool) -> None:
    weight = torch.randn(5, 7, dtype=torch.float64)
    x = torch.randn(13, 5, 7, dtype=torch.float64)
    case = joint(lambda w, x: function(w) * x, [weight], [x], inductor=inductor)
    assert_sunk(check(case, (0, 2, 3)), weight.numel())


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": lambda a, b: torch.sub(a, b, alpha=2),
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 1),
    "div_by_weight": lambda a, b: b / (a.abs() + 1),
    "where": lambda a, b: torch.where(b > 0, a, b),
    "atan2": torch.atan2,
    "addcmul": lambda a, b: torch.addcmul(a, b, b, value=0.5),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
}


@pytest.mark.parametrize("other", [(5, 7), (1, 7), (5, 1), (7,), (1,), ()], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("function", BINARY.values(), ids=BINARY)
def test_slice_sinks_through_broadcasting(
    function: Callable[[Tensor, Tensor], Tensor], dim: int, other: tuple[int, ...]
) -> None:
    weight = torch.randn(5, 7, dtype=torch.float64)
    operand = torch.randn(other, dtype=torch.float64)
    x = torch.randn(13, 5, 7, dtype=torch.float64)
    case = joint(lambda w, o, x: function(w, o) * x, [weight], [operand, x])
    assert_sunk(check(case, (dim, 1, 3)), weight.numel())


@pytest.mark.parametrize("shape", [(5, 1), (1, 7), (7,), (1, 1)], ids=str)
def test_gradient_of_a_broadcast_weight(shape: tuple[int, ...]) -> None:
    """Backward of broadcasting sums; the weight's own dimensions of size 1 are cut too."""
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(13, 5, 7, dtype=torch.float64)
    case = joint(lambda w, x: w * x, [weight], [x])
    for dim, size in enumerate(shape):
        region = check(case, (dim, size - 1, 1))
        if size > 1:
            assert_sunk(region, weight.numel(), x.numel())


def test_dropout_mask_is_sliced() -> None:
    weight = torch.randn(5, 7, dtype=torch.float64)
    mask = torch.rand(5, 7) > 0.4
    x = torch.randn(13, 5, 7, dtype=torch.float64)
    case = joint(lambda w, m, x: w * m * 2.5 * x, [weight], [mask, x])
    assert_sunk(check(case, (1, 3, 2)), weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    weight, x = torch.randn(5, 7).to(dtype), torch.randn(13, 5, 7)
    case = joint(lambda w, x: functional.silu(w * 2) * x, [weight], [x])
    assert_sunk(check(case, (0, 1, 3), tolerance=2 * torch.finfo(dtype).eps), weight.numel())


def test_refuses_random_operators() -> None:
    """A smaller draw would be another draw: the whole value is drawn, then sliced."""
    aten = torch.ops.aten
    for target in (aten.bernoulli.p, aten.rand_like.default, aten.native_dropout.default, aten.randn_like.default):
        assert rule_for(target) is None
    assert rule_for(aten.mul.Tensor) is not None


def test_refuses_operators_that_write() -> None:
    assert rule_for(torch.ops.aten.mul_.Tensor) is None
    assert rule_for(torch.ops.aten.add.out) is None


def test_refuses_softmax() -> None:
    """Each result of softmax backward needs all of its row: no rule, the gradient stays dense."""
    weight = torch.randn(5, 7, dtype=torch.float64)
    x = torch.randn(13, 5, 7, dtype=torch.float64)
    case = joint(lambda w, x: w.softmax(-1) * x, [weight], [x])
    region = check(case, (1, 2, 3))
    (dense,) = region.dense
    assert (dense.op, dense.reason) == (
        "aten._softmax_backward_data.default",
        "no rule is known for this operator",
    )
