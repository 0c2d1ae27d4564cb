"""Slices sink through operators that move, copy or join elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.passes.joint import Refusal, assert_sunk, check, joint, refused

aten = torch.ops.aten
W = (6, 7, 3)
Function = Callable[[Tensor], Tensor]

# Operator of the forward, and the dimensions of ``f64[6, 7, 3]`` along which a slice of its gradient sinks.
SINKS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "permute": (lambda w: w.permute(2, 0, 1), (0, 1, 2)),
    "transpose": (lambda w: w.transpose(-1, 0), (0, 1, 2)),
    "t": (lambda w: w.flatten(1).t(), (0,)),
    "view_keeps_dim": (lambda w: w.reshape(6, 21), (0,)),
    "view_merges_outer_part": (lambda w: w.reshape(6, 21), (1,)),
    "view_splits_other_dim": (lambda w: w.view(6, 7, 3, 1, 1), (0, 1, 2)),
    "unsqueeze": (lambda w: w.unsqueeze(1), (0, 1, 2)),
    "squeeze": (lambda w: w.unsqueeze(2).squeeze(2), (0, 1, 2)),
    "expand": (lambda w: w.expand(2, 6, 7, 3), (0, 1, 2)),
    "expand_inner": (lambda w: w.unsqueeze(1).expand(6, 2, 7, 3), (0, 1, 2)),
    "clone": (lambda w: w.transpose(0, 1).contiguous(), (0, 1, 2)),
    "cat_other_dim": (lambda w: torch.cat([w, w * 2], 1), (0, 2)),
    "stack": (lambda w: torch.stack([w, w.tanh()]), (0, 1, 2)),
    "chunk": (lambda w: w[:, :3] * w[:, 4:], (0, 2)),
    "slice_other_dim": (lambda w: w[:, 1:5], (0, 2)),
    "slice_step": (lambda w: w[:, ::2], (0, 2)),
    "select": (lambda w: w[:, 2], (0, 2)),
    "pad_other_dim": (lambda w: functional.pad(w, (1, 2)), (0, 1)),
    "flip": (lambda w: w.flip(1), (0, 2)),
    "roll": (lambda w: w.roll(2, 1), (0, 2)),
    "roll_two_dims": (lambda w: w.roll((2, -1), (0, -1)), (1,)),
    "repeat": (lambda w: w.repeat(1, 2, 1), (0, 2)),
}
SUNK = [pytest.param(f, dim, id=f"{name}-{dim}") for name, (f, dims) in SINKS.items() for dim in dims]


def _case(function: Function, inductor: bool = False) -> tuple[Callable[..., Tensor], Tensor, Tensor, bool]:
    weight = torch.randn(W, dtype=torch.float64)
    x = torch.randn(13, *function(weight).shape, dtype=torch.float64)
    return (lambda w, x: function(w) * x), weight, x, inductor


@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize(("function", "dim"), SUNK)
def test_slice_sinks_to_the_sum(function: Function, dim: int, inductor: bool) -> None:
    forward, weight, x, inductor = _case(function, inductor)
    region = check(joint(forward, [weight], [x], inductor=inductor), (dim, 1, 2))
    assert_sunk(region, weight.numel())


STAYS_EXACT: dict[str, tuple[Function, int, str]] = {
    "view_of_an_inner_part": (lambda w: w.reshape(6, 21).exp(), 2, "view"),
    "view_of_merged_dimensions": (lambda w: w.view(2, 3, 7, 3).exp(), 0, "view"),
    "flip_along_the_cut": (lambda w: w.flip(0), 0, "flip"),
    "roll_along_the_cut": (lambda w: w.roll(2, 0), 0, "roll"),
    "roll_without_dimensions": (lambda w: w.roll(2), 0, "roll"),
    "pad_along_the_cut": (lambda w: functional.pad(w, (0, 0, 1, 2)).exp()[:, 1:], 1, "constant_pad_nd"),
    "joined_along_the_cut": (lambda w: w[1:] + w[:-1], 0, "slice_backward"),
    "selected_along_the_cut": (lambda w: w[2], 0, "select_backward"),
}


@pytest.mark.parametrize(("function", "dim", "operator"), STAYS_EXACT.values(), ids=STAYS_EXACT)
def test_refused_gradient_stays_exact(function: Function, dim: int, operator: str) -> None:
    """What a rule refuses is computed whole, sliced afterwards, and reported with operator, bytes and reason."""
    forward, weight, x, _ = _case(function)
    region = check(joint(forward, [weight], [x]), (dim, 1, 2))
    assert region.dense
    for report in region.dense:
        assert operator in report.op
        assert report.nbytes == weight.numel() * 8
        assert report.output == 0
        assert report.reason


def _randn(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


_VIEW = "the cut dimension merges dimensions of the viewed value, or is an inner part of one"
REFUSALS: dict[str, Refusal] = {
    "view_of_an_inner_part": (2, aten.view.default, (_randn(6, 21), [6, 7, 3]), None, _VIEW),
    "view_of_merged_dimensions": (0, aten.reshape.default, (_randn(2, 3, 7), [6, 7]), None, _VIEW),
    "added_dimension": (
        1, aten.unsqueeze.default, (_randn(5, 7), 1), None, "the cut dimension is the one that the operator adds",
    ),
    "every_second_index": (
        0, aten.slice.Tensor, (_randn(9, 5), 0, 0, 9, 2), None,
        "the operator takes every n-th index along the cut dimension",
    ),
    "slice_from_the_end": (
        0, aten.slice.Tensor, (_randn(9, 5), 0, -3), None,
        "the index at which the operator's own slice begins is not known",
    ),
    "sliced_along_the_cut": (
        0, aten.slice_backward.default, (_randn(3, 5), [9, 5], 0, 2, 5, 1), None, "the sliced dimension is the cut one",
    ),
    "selected_along_the_cut": (
        0, aten.select_backward.default, (_randn(5), [9, 5], 0, 2), None,
        "one index along the cut dimension was selected",
    ),
    "replaced_slice_along_the_cut": (
        0, aten.slice_scatter.default, (_randn(9, 5), _randn(2, 5), 0, 3, 5), None,
        "the operator replaces indices along the cut dimension",
    ),
    "replaced_index_along_the_cut": (
        0, aten.select_scatter.default, (_randn(9, 5), _randn(5), -2, 3), None,
        "the operator replaces indices along the cut dimension",
    ),
    "flip_along_the_cut": (
        1, aten.flip.default, (_randn(5, 7), [-1]), None, "the order along the cut dimension is reversed",
    ),
    "joined_along_the_cut": (
        0, aten.cat.default, ([_randn(5, 7), _randn(2, 7)], 0), None,
        "the parts are joined along the cut dimension, at places that a slice may cross",
    ),
    "joined_with_an_empty_vector": (
        0, aten.cat.default, ([_randn(5, 7), _randn(0)], 1), None,
        "a joined part has fewer dimensions than the result",
    ),
    "roll_along_the_cut": (
        1, aten.roll.default, (_randn(5, 7), [2], [-1]), None,
        "the operator rolls the elements along the cut dimension",
    ),
    "roll_without_dimensions": (
        0, aten.roll.default, (_randn(5, 7), [2]), None,
        "the operator rolls the elements of all dimensions as one vector",
    ),
    "pad_along_the_cut": (1, aten.constant_pad_nd.default, (_randn(5, 7), [1, 0]), None, "the cut dimension is padded"),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "target", "args", "result", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(dim: int, target: Any, args: tuple[Any, ...], result: int | None, reason: str) -> None:
    assert refused(dim, target, *args, result=result).reason == reason


def test_dtype_of_a_cast_weight_is_kept() -> None:
    weight = torch.randn(W, dtype=torch.bfloat16)
    x = torch.randn(13, *W)
    case = joint(lambda w, x: w.float() * x, [weight], [x])
    region = check(case, (1, 2, 3), tolerance=2**-8)
    assert_sunk(region, weight.numel())


def test_start_beyond_the_trace_is_a_run_time_value() -> None:
    """One rewritten graph serves every start."""
    forward, weight, x, _ = _case(SINKS["clone"][0])
    case = joint(forward, [weight], [x])
    region = check(case, (1, 0, 2))
    dense = case.dense()[0]
    for start in range(6):
        torch.testing.assert_close(case.run(region, [start])[1], dense[:, start : start + 2], rtol=1e-9, atol=1e-12)
