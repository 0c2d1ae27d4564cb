"""Slices of the weight and bias gradients of normalisations are computed from slices of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.passes.joint import Joint, Refusal, assert_sunk, check, count, joint, refused, rewritten

aten = torch.ops.aten


def _randn(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


def _cut(draw: Any, size: int) -> tuple[int, int, int]:
    length = draw(st.integers(1, size))
    return 0, draw(st.integers(0, size - length)), length


def _layer_norm(x: Tensor, channels: int) -> tuple[Callable[..., Tensor], Tensor]:
    return (lambda w, b, x: functional.layer_norm(x, (channels,), w, b)), x.movedim(1, -1).contiguous()


def _group_norm(groups: int) -> Callable[[Tensor, int], tuple[Callable[..., Tensor], Tensor]]:
    return lambda x, channels: ((lambda w, b, x: functional.group_norm(x, groups, w, b)), x)


def _batch_norm(x: Tensor, channels: int) -> tuple[Callable[..., Tensor], Tensor]:
    return (lambda w, b, x: functional.batch_norm(x, None, None, w, b, training=True)), x


def _instance_norm(x: Tensor, channels: int) -> tuple[Callable[..., Tensor], Tensor]:
    return (lambda w, b, x: functional.instance_norm(x, None, None, w, b)), x


KINDS = {
    "layer": _layer_norm,
    "group_1": _group_norm(1),
    "group_3": _group_norm(3),
    "batch": _batch_norm,
    "instance": _instance_norm,
}
BACKWARD = {
    "layer": aten.native_layer_norm_backward.default,
    "group_1": aten.native_group_norm_backward.default,
    "group_3": aten.native_group_norm_backward.default,
    "batch": aten.native_batch_norm_backward.default,
}


def _case(kind: str, space: tuple[int, ...], channels: int, inductor: bool = False) -> Joint:
    function, x = KINDS[kind](_randn(4, channels, *space), channels)
    return joint(function, [_randn(channels), _randn(channels)], [x], inductor=inductor)


@settings(max_examples=60)
@given(st.data())
def test_random_normalization(data: st.DataObject) -> None:
    draw = data.draw
    kind = draw(st.sampled_from(sorted(KINDS)))
    channels = draw(st.sampled_from([3, 6]))
    space = draw(st.sampled_from([(5,), (2, 3), (2, 2, 2)]))
    case = _case(kind, space, channels, draw(st.booleans()))
    bias = draw(st.sampled_from([None, "whole", _cut(draw, channels)]))
    check(case, _cut(draw, channels), bias)


@pytest.mark.parametrize("output", [0, 1], ids=["weight", "bias"])
@pytest.mark.parametrize("kind", sorted(BACKWARD))
def test_slice_replaces_the_backward_operator(kind: str, output: int) -> None:
    asked = [None, (0, 1, 3)]
    case = _case(kind, (5, 7), 6)
    region = check(case, *(asked if output == 1 else asked[::-1]))
    assert count(region, BACKWARD[kind]) == 0
    assert_sunk(region, 6)


def test_rms_norm_from_elementwise_operators() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    assert_sunk(check(joint(function, [_randn(11)], [_randn(3, 5, 11)]), (0, 2, 4)), 11)


def test_fused_rms_norm() -> None:
    """The fused operator has no CPU kernel in every supported version: its graph is made here, and evaluated
    against the formula of its weight gradient, the sum of dy * x * rstd over rows."""
    case = joint(lambda w, x: functional.rms_norm(x, (11,), w), [_randn(11)], [_randn(3, 5, 11)])
    region = check(case, (0, 2, 4))
    assert count(region, aten._fused_rms_norm_backward.default) == 0
    assert_sunk(region, 11)


def test_input_gradient_keeps_the_fused_operator() -> None:
    """One operator gives both gradients: with the input gradient needed, the weight's is free and only sliced."""
    below = _randn(6)

    def function(b: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return functional.layer_norm(x * b, (6,), w)

    region = check(joint(function, [below, _randn(6)], [_randn(4, 5, 6)]), "whole", (0, 1, 3))
    assert count(region, aten.native_layer_norm_backward.default) == 1
    assert region.dense == []


def test_undemanded_weight_gradient_is_masked() -> None:
    def function(b: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return functional.layer_norm(x * b, (6,), w)

    region = check(joint(function, [_randn(6), _randn(6)], [_randn(4, 5, 6)]), "whole", None)
    (node,) = region.graph.find_nodes(op="call_function", target=aten.native_layer_norm_backward.default)
    assert node.args[7] == [True, False, False]


_ROWS, _STATISTIC, _WHICH = _randn(4, 5, 6), _randn(4, 1, 1), [True, True, True]
REFUSALS: dict[str, Refusal] = {
    "layer_norm_over_two_dimensions": (
        0, aten.native_layer_norm_backward.default,
        (_ROWS, _ROWS, [5, 6], _STATISTIC, _STATISTIC, _randn(5, 6), _randn(5, 6), _WHICH), 1,
        "the layer norm normalises several dimensions",
    ),
    "rms_norm_over_two_dimensions": (
        0, aten._fused_rms_norm_backward.default,
        (_ROWS, _ROWS, [5, 6], _STATISTIC, _randn(5, 6), [True, True]), 1,
        "the RMS norm normalises several dimensions",
    ),
    "batch_norm_with_running_statistics": (
        0, aten.native_batch_norm_backward.default,
        (_ROWS, _ROWS, _randn(5), _randn(5), _randn(5), None, None, False, 1e-5, _WHICH), 1,
        "the batch norm uses running statistics, so that it saves none of the batch",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "target", "args", "result", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(dim: int, target: Any, args: tuple[Any, ...], result: int | None, reason: str) -> None:
    assert refused(dim, target, *args, result=result).reason == reason


def test_refuses_group_norm_with_symbolic_channels() -> None:
    case = joint(
        lambda w, x: functional.group_norm(x, 2, w), [_randn(6)], [_randn(4, 6, 5)], dynamic={0: (0,), 1: (1,)}
    )
    assert [d.reason for d in rewritten(case, (0, 1, 3)).dense] == ["the number of channels is known at run time only"]


def test_layer_norm_over_two_dimensions_stays_exact() -> None:
    case = joint(lambda w, x: functional.layer_norm(x, (5, 6), w), [_randn(5, 6)], [_randn(4, 5, 6)])
    region = check(case, (0, 1, 3))
    assert [d.op for d in region.dense] == ["aten.native_layer_norm_backward.default"]


def test_batch_norm_in_evaluation_stays_exact() -> None:
    """With running statistics the operator saves no batch statistics to slice."""

    def function(w: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, var, w, training=False)

    case = joint(function, [_randn(6)], [_randn(4, 6, 5), _randn(6), _randn(6).exp()])
    region = check(case, (0, 1, 3))
    assert [d.op for d in region.dense] == ["aten.native_batch_norm_backward.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    """Low-precision gradients are summed in float32, as the fused operator does."""
    weight, bias, x = _randn(6).to(dtype), _randn(6).to(dtype), _randn(4, 5, 6).to(dtype)
    case = joint(lambda w, b, x: functional.layer_norm(x, (6,), w, b), [weight, bias], [x])
    region = check(case, (0, 1, 3), (0, 2, 2), tolerance=2 * torch.finfo(dtype).eps)
    assert_sunk(region, 6)
