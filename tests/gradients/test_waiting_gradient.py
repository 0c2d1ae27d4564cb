"""The waiting gradient: what torch does with gradients, on one whose bytes lie in host memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.errors import WaitingGradientError
from chunkft_fx.gradients.waiting import Waiting, WaitingGradient, WaitingPart
from chunkft_fx.plan.chunk import Slice

ROWS = 6


def waiting(values: Tensor, cuts: Sequence[int]) -> WaitingGradient:
    """These values (two dimensions), cut along the first; host memory is a list of tensors."""
    bounds = [0, *sorted(set(cuts)), ROWS]
    slices = [Slice("w", 0, a, b - a, ROWS) for a, b in pairwise(bounds) if b > a]

    def send(s: Slice, part: Tensor) -> WaitingPart:
        host = part.clone()
        return WaitingPart(s, host, torch.linalg.vector_norm(host), torch.linalg.vector_norm(host, inf))

    def bring(part: WaitingPart) -> Tensor:
        shape = (part.slice.length, values.shape[1])
        return torch.zeros(shape, dtype=values.dtype) if part.host is None else part.scaled(part.host.clone())

    parts = [send(s, values.narrow(0, s.start, s.length)) for s in slices]
    return WaitingGradient(Waiting("w", values.shape, values.dtype, values.device, parts, bring, send))


READS: list[Callable[[Tensor], Any]] = [
    lambda g: g.clone(),
    lambda g: g.norm(),
    lambda g: torch.linalg.vector_norm(g, inf),
    lambda g: torch.linalg.vector_norm(g, 1.0),
    lambda g: torch.linalg.vector_norm(g, 2.0, dim=0),
    lambda g: torch.linalg.vector_norm(g, 2.0, dtype=torch.float64),
    lambda g: g.sum(1),
    lambda g: g.mean(),
    lambda g: g.abs().max(),
    lambda g: torch.isfinite(g).all(),
    lambda g: g * 2 + 1,
    lambda g: 1 - g,
    lambda g: g @ torch.ones(3, 2, dtype=g.dtype),
    lambda g: g.half(),
    lambda g: g.to("cpu", torch.float16),
    lambda g: torch.add(torch.ones(ROWS, 3, dtype=g.dtype), g),
    lambda g: torch.ones(ROWS, 3, dtype=g.dtype).add_(g),
    lambda g: torch.empty(ROWS, 3, dtype=g.dtype).copy_(g),
    lambda g: torch.zeros_like(g),
    lambda g: copy.deepcopy(g),
    lambda g: pickle.loads(pickle.dumps(g)),
    lambda g: torch.nn.utils.get_total_norm([g, g]),
    lambda g: list(torch._foreach_norm([g, g])),
    lambda g: torch.equal(g, g),
    lambda g: (g.shape, g.dtype, g.device, g.stride(), g.requires_grad, g.is_floating_point(), g.numel()),
]
WRITES: list[Callable[[Tensor], Any]] = [
    lambda g: g.mul_(0.5),
    lambda g: g.mul_(torch.tensor(-3.0)),
    lambda g: g.div_(3),
    lambda g: g.add_(torch.ones(ROWS, 3, dtype=g.dtype)),
    lambda g: g.add_(1),
    lambda g: g.mul_(torch.arange(3.0).to(g.dtype)),
    lambda g: g.clamp_(-0.5, 0.5),
    lambda g: g.copy_(torch.arange(18.0).view(ROWS, 3)),
    lambda g: g.zero_(),
    lambda g: g.detach().mul_(0.1),
    lambda g: g.data.add_(2),
    lambda g: torch._foreach_mul_([g, torch.ones(2)], 0.25),
    lambda g: torch._foreach_zero_([torch.ones(2), g]),
    lambda g: g.fill_(0.125),
]
values = st.lists(st.floats(-3, 3, width=32), min_size=18, max_size=18)


@given(
    numbers=values,
    cuts=st.lists(st.integers(0, ROWS), max_size=3),
    writes=st.lists(st.sampled_from(WRITES), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_does_what_a_gradient_does(
    numbers: list[float], cuts: list[int], writes: list[Callable[[Tensor], Any]], dtype: torch.dtype
) -> None:
    dense = torch.tensor(numbers, dtype=dtype).view(ROWS, 3)
    ours = waiting(dense, cuts)
    for write in writes:
        write(ours)
        write(dense)
        assert torch.equal(ours.clone(), dense)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for read in READS:
        found, wanted = read(ours), read(dense)
        assert type(found) is type(wanted)
        if isinstance(wanted, Tensor | list):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        else:
            assert found == wanted


REFUSED: list[Callable[[Tensor], Any]] = [
    lambda g: g[0],
    lambda g: g.view(-1),
    lambda g: g.t(),
    lambda g: g.narrow(0, 0, 2),
    lambda g: g.unsqueeze(0),
    lambda g: list(g.unbind()),
    lambda g: torch.stack([g, g]),
    lambda g: torch.cat([g, torch.ones(1, 3)]),
    lambda g: torch._foreach_add_([g], 1.0),
    lambda g: torch._foreach_mul_([g], [2.0]),
    lambda g: torch.add(torch.ones(ROWS, 3), 1, out=g),
    lambda g: g.resize_(2, 2),
    lambda g: g.t_(),
    lambda g: g.unsqueeze_(0),
]


@pytest.mark.parametrize("use", REFUSED)
def test_views_and_lists_are_refused(use: Callable[[Tensor], Any]) -> None:
    dense = torch.arange(18.0).view(ROWS, 3)
    ours = waiting(dense, [2])
    with pytest.raises(WaitingGradientError):
        use(ours)
    assert torch.equal(ours.clone(), dense)


@given(values, st.sampled_from([0.0, inf, -inf, nan]), st.floats(0.125, 4), st.booleans())
def test_a_scaler_finds_what_is_not_finite(numbers: list[float], wrong: float, scale: float, is_mixed: bool) -> None:
    numbers[3] += wrong
    dense, more = torch.tensor(numbers).view(ROWS, 3), torch.ones(2)
    ours = waiting(dense, [1, 4])
    found = []
    for gradient in (ours, dense):
        others = [more.clone()] if is_mixed else []
        found.append(torch.zeros(()))
        torch._amp_foreach_non_finite_check_and_unscale_([gradient, *others], found[-1], torch.tensor(scale))
        assert all(torch.equal(o, more * scale) for o in others)
    assert torch.equal(*found)
    torch.testing.assert_close(ours.clone(), dense, rtol=1e-6, atol=0, equal_nan=True)


def test_a_norm_that_overflows_is_no_gradient_that_does() -> None:
    ours = waiting(torch.full((ROWS, 3), 1e30), [])
    found = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_([ours], found, torch.tensor(0.5))
    assert not found
    assert torch.isinf(ours.norm())


def test_what_says_that_it_cannot_be_read_is_not() -> None:
    ours = waiting(torch.ones(ROWS, 3), [3])
    ours.value.problem = "is gone"
    for use in (*READS[:4], *WRITES[:2]):
        with pytest.raises(WaitingGradientError, match="'w' is gone"):
            use(ours)
    assert "'w'" in repr(ours)
    ours.zero_()
    assert torch.equal(ours.clone(), torch.zeros(ROWS, 3))
