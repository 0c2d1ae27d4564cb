"""What ``parameter.grad`` is behind a backward that updates: nothing can be read of it, and nothing trips over it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.errors import StaleBackward, UnsupportedGraph, UsedGradientError
from chunkft_fx.gradients.used import UsedGradient
from chunkft_fx.module.module import CompiledModule
from tests.runtime.test_full_coverage import assert_equal, batch, twins
from tests.runtime.test_waiting_gradients import Square
from tests.support.forced_streaming import streaming
from tests.support.waiting import waiting_in_host


def trained(dtype: torch.dtype = torch.float64) -> tuple[CompiledModule, nn.Module, Any, Any]:
    """A model behind a backward that has updated it, beside a plain one behind its own backward."""
    plain, model = twins(dtype=dtype)
    ours = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    assert isinstance(ours, CompiledModule)
    optimizers = chunkft_fx.AdamW(ours, lr=1e-2, update="backward"), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for m in (ours, plain):
        m(batch(0)).backward()
    return ours, plain, *optimizers


USES: list[Callable[[nn.Module, Any], object]] = [
    lambda m, o: torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    lambda m, o: torch.nn.utils.clip_grad_value_(m.parameters(), 1.0),
    lambda m, o: torch.nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None]),
    lambda m, o: [p.grad.norm() for p in m.parameters() if p.grad is not None],
    lambda m, o: [p.grad.clone() for p in m.parameters() if p.grad is not None],
    lambda m, o: [p.grad.mul_(0.5) for p in m.parameters() if p.grad is not None],
    lambda m, o: [pickle.dumps(p.grad) for p in m.parameters()],
    lambda m, o: _unscale(o),
]


def _unscale(optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


@pytest.mark.parametrize("use", USES)
def test_nothing_can_be_read_of_it(use: Callable[[nn.Module, Any], object]) -> None:
    ours, _, optimizer, _ = trained()
    with pytest.raises(UsedGradientError, match='update="step"'):
        use(ours, optimizer)
    optimizer.step()
    assert all(p.grad is None for p in ours.parameters())


def nothing(model: nn.Module, optimizer: Any) -> None: ...


ACTIONS: list[Callable[[nn.Module, Any], object]] = [
    nothing,
    lambda m, o: o.zero_grad(),
    lambda m, o: o.zero_grad(set_to_none=False),
    lambda m, o: m.zero_grad(set_to_none=False),
    lambda m, o: torch._foreach_zero_([torch.ones(2), *(p.grad for p in m.parameters() if p.grad is not None)]),
    lambda m, o: [p.grad.detach() for p in m.parameters() if p.grad is not None],
    lambda m, o: (m.state_dict(), o.state_dict(), repr([p.grad for p in m.parameters()])),
    lambda m, o: copy.deepcopy([p.grad for p in m.parameters()]),
    lambda m, o: m.eval()(batch(0)),
]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("is_before", [True, False])
def test_nothing_trips_over_it(action: Callable[[nn.Module, Any], object], is_before: bool) -> None:
    """Neither before the step nor behind it, nor in the backward of the next step, with accumulation or without."""
    ours, plain, optimizer, theirs = trained()
    for step in range(1, 4):
        if is_before:
            action(ours, optimizer)
        optimizer.step()
        theirs.step()
        theirs.zero_grad()
        if not is_before:
            action(ours, optimizer)
        ours.train()
        if step == 2:
            with ours.no_sync():
                ours(batch(10)).backward()
            plain(batch(10)).backward()
        for m in (ours, plain):
            m(batch(step)).backward()
    optimizer.step()
    theirs.step()
    assert_equal(ours, plain, 1e-9)


def test_it_is_there_for_streamed_weights_too() -> None:
    with streaming("all"):
        ours, *_ = trained()
        assert all(isinstance(p.grad, UsedGradient) for p in ours.parameters())


def test_hooks_and_gradients_of_some_alone_are_refused_before_anything_changes() -> None:
    ours, _, optimizer, _ = trained()
    optimizer.step()
    before = copy.deepcopy(ours.state_dict())
    p = ours.get_parameter("layers.0.weight")
    handle = p.register_post_accumulate_grad_hook(lambda q: None)
    with pytest.raises(UnsupportedGraph, match=r"layers\.0\.weight.*hook"):
        ours(batch(1)).backward()
    handle.remove()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    ours(batch(1)).backward()


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_weight_frozen_between_forward_and_backward_is_refused_before_anything_changes(update: str) -> None:
    """As it is in a program that sends gradients to host memory, also for a backward that only accumulates."""
    plain, model = twins()
    with waiting_in_host():
        ours = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
        optimizer = chunkft_fx.AdamW(ours, lr=1e-2, update=update)
        theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        loss = ours(batch(0))
        before = copy.deepcopy(ours.state_dict())
        for m in (ours, plain):
            m.get_parameter("layers.0.weight").requires_grad_(False)
        with pytest.raises(StaleBackward, match=r"'layers\.0\.weight' was frozen"):
            loss.backward()
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        assert all(p.grad is None for p in ours.parameters())
        for m, o in ((ours, optimizer), (plain, theirs)):
            m(batch(1)).backward()
            o.step()
        assert_equal(ours, plain, 1e-9)


def test_a_backward_behind_one_that_updated_says_what_changed_the_weights() -> None:
    ours, _, optimizer, _ = trained()
    optimizer.step()
    first, second = ours(batch(1)), ours(batch(2))
    first.backward()
    with pytest.raises(StaleBackward, match=r"another backward.*no_sync\(\)"):
        second.backward()


@pytest.mark.parametrize("update", ["step", "backward"])
def test_gradients_of_some_alone_are_refused(update: str) -> None:
    """A gradient penalty asks for those of inputs; the program would update weights, or add to what waits, unasked."""
    with waiting_in_host():
        ours = chunkft_fx.compile(Square(), "1GB", coverage="all", backend="eager")
        chunkft_fx.AdamW(ours, update=update)
        x = torch.ones(2, 64, dtype=torch.bfloat16, requires_grad=True)
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(UnsupportedGraph, match="inputs="):
            torch.autograd.grad(ours(x), [x])
        with pytest.raises(UnsupportedGraph, match="inputs="):
            ours(x).backward(inputs=[x])
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        assert all(p.grad is None for p in ours.parameters())
        ours(x).backward()
        assert x.grad is not None
