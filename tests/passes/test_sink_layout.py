"""Slices sink through operators that move, copy or join elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.passes.joint import assert_sunk, check, joint

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


REFUSED: dict[str, tuple[Function, int, str]] = {
    "view_of_an_inner_part": (lambda w: w.reshape(6, 21).exp(), 2, "view"),
    "view_of_merged_dimensions": (lambda w: w.view(2, 3, 7, 3).exp(), 0, "view"),
    "flip_along_the_cut": (lambda w: w.flip(0), 0, "flip"),
    "pad_along_the_cut": (lambda w: functional.pad(w, (0, 0, 1, 2)).exp()[:, 1:], 1, "constant_pad_nd"),
    "joined_along_the_cut": (lambda w: w[1:] + w[:-1], 0, "slice_backward"),
    "selected_along_the_cut": (lambda w: w[2], 0, "select_backward"),
}


@pytest.mark.parametrize(("function", "dim", "operator"), REFUSED.values(), ids=REFUSED)
def test_refuses(function: Function, dim: int, operator: str) -> None:
    """What a rule refuses is computed whole, sliced afterwards, and reported with operator, bytes and reason."""
    forward, weight, x, _ = _case(function)
    region = check(joint(forward, [weight], [x]), (dim, 1, 2))
    assert region.dense
    for report in region.dense:
        assert operator in report.op
        assert report.nbytes == weight.numel() * 8
        assert report.output == 0
        assert report.reason


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
