"""What torch does past the dispatch of a gradient that stands for others: taken, or refused by name; never ignored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.errors import ChunkFTError, SliceGradientError, UsedGradientError, WaitingGradientError
from chunkft_fx.gradients.slice_gradient import SliceGradient
from chunkft_fx.gradients.used import UsedGradient
from chunkft_fx.gradients.waiting import WaitingGradient
from tests.runtime.test_full_coverage import batch, twins
from tests.support.waiting import waiting_in_host

NAME = "embed.weight"
Case = tuple[chunkft_fx.AdamW, Tensor, Tensor]


def gradient(kind: str) -> Case:
    """An optimizer behind a backward, a parameter, and its gradient on the plain model."""
    plain, model = twins()
    with waiting_in_host():
        if kind == "slice":
            ours = chunkft_fx.compile(model, "1GB", chunks=5, interval=1, backend="eager")
        else:
            ours = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
        optimizer = chunkft_fx.AdamW(ours, lr=1e-2, update="backward" if kind == "used" else "step")
        for m in (plain, ours):
            m(batch(0)).backward()
    expected = plain.get_parameter(NAME).grad
    assert expected is not None
    return optimizer, ours.get_parameter(NAME), expected


@pytest.fixture(params=["slice", "waiting"])
def held(request: pytest.FixtureRequest) -> tuple[str, Case]:
    return request.param, gradient(request.param)


def values(p: Tensor) -> Tensor:
    """The values of a parameter's gradient: of the slice alone, or all of them."""
    assert p.grad is not None
    return p.grad.part if isinstance(p.grad, SliceGradient) else p.grad.clone()


def test_data_is_the_gradient_and_what_is_assigned_to_it_is_taken(held: tuple[str, Case]) -> None:
    kind, (_, p, _) = held
    assert isinstance(p.grad, SliceGradient if kind == "slice" else WaitingGradient)
    before = values(p).clone()
    p.grad.data.mul_(3)
    torch.testing.assert_close(values(p), before * 3)
    p.grad.data = torch.full(p.shape, 0.25, dtype=p.dtype)
    assert bool((values(p) == 0.25).all())
    assert type(p.grad.data) is type(p.grad)


def test_data_of_another_shape_is_refused_and_changes_nothing(held: tuple[str, Case]) -> None:
    kind, (_, p, _) = held
    before = values(p).clone()
    assert p.grad is not None
    with pytest.raises(SliceGradientError if kind == "slice" else WaitingGradientError, match=r"data of shape \[1\]"):
        p.grad.data = torch.zeros(1, dtype=p.dtype)
    assert torch.equal(values(p), before)


def test_an_assigned_gradient_is_what_the_step_uses() -> None:
    optimizer, p, _ = gradient("waiting")
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = p.detach().clone()
    assert p.grad is not None
    p.grad.data = torch.zeros_like(before)
    optimizer.step()
    assert torch.equal(p, before)


def test_a_waiting_gradient_can_be_read_by_numpy_and_as_a_list() -> None:
    _, p, expected = gradient("waiting")
    assert p.grad is not None
    torch.testing.assert_close(torch.from_numpy(p.grad.numpy()), expected)
    torch.testing.assert_close(torch.tensor(p.grad.tolist(), dtype=p.dtype), expected)


@pytest.mark.parametrize(("kind", "error"), [("slice", SliceGradientError), ("used", UsedGradientError)])
def test_what_is_not_there_is_refused_by_name(kind: str, error: type[ChunkFTError]) -> None:
    _, p, _ = gradient(kind)
    g = p.grad
    assert isinstance(g, SliceGradient | UsedGradient)
    for read in (g.numpy, g.tolist):
        with pytest.raises(error, match=NAME):
            read()
    if kind == "used":
        with pytest.raises(error, match=NAME):
            g.data = torch.zeros(p.shape, dtype=p.dtype)
        with pytest.raises(error, match=NAME):
            g += 1
