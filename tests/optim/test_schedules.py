"""Optimizers under the schedulers of torch and transformers, as their users write it: rates that updates use."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from tests.support.small_net import compiled, feed, net
from tests.support.tiny_lm import lm_batch, tiny_lm

STEPS, PEAK = 60, 0.05
Scheduled = Callable[[Optimizer], Any]
SCHEDULES: dict[str, Scheduled] = {
    "linear": lambda o: get_linear_schedule_with_warmup(o, 7, STEPS),
    "cosine": lambda o: get_cosine_schedule_with_warmup(o, 7, STEPS),
    "one_cycle": lambda o: OneCycleLR(o, PEAK, STEPS, cycle_momentum="d" not in o.defaults),  # not of Adafactor
    "one_cycle_of_rates": lambda o: OneCycleLR(o, PEAK, STEPS, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=9), CosineAnnealingLR(o, STEPS - 9)], [9]),
    "chained": lambda o: ChainedScheduler([ConstantLR(o, 0.5, 4), StepLR(o, 20)]),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 17),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=3),
}
Made = Callable[..., ChunkedOptimizer]
KINDS: dict[str, Made] = {
    "adamw": chunkft_fx.AdamW,
    "sgd": lambda model, **options: chunkft_fx.SGD(model, momentum=0.9, **options),
    "adafactor": chunkft_fx.Adafactor,
}


class Row(nn.Module):
    """Four parameters whose gradients are fed."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.register_parameter(name, nn.Parameter(torch.zeros(4, 2, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        return sum((x @ p).sum() for p in self.parameters())  # type: ignore[return-value]


def advance(scheduler: Any, loss: float) -> None:
    scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["linear", "cosine", "one_cycle_of_rates", "sequential"])
@pytest.mark.parametrize(("chunks", "order", "interval"), [(5, "ascending", 1), (7, "random", 1), (3, "descending", 2)])
def test_every_element_moves_by_the_same_sum_of_rates(name: str, chunks: int, order: str, interval: int) -> None:
    """With gradients of 1, Adam moves an element by the sum of the rates of its updates."""
    module = compiled(Row(), chunks, order, interval)
    optimizer = chunkft_fx.AdamW(module, lr=PEAK, eps=0, weight_decay=0)
    scheduler = SCHEDULES[name](optimizer)
    for step in range(STEPS):
        for s in module.active_slices():
            s.grad = torch.ones_like(s.weight())
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 < STEPS:
            scheduler.step()
    moved = torch.cat([-p.detach().flatten() for p in module.parameters()])
    assert (moved.max() - moved.min()) / moved.max() < 0.05
    ideal = sum(set_rates(name)) / chunks
    assert moved.mean().item() == pytest.approx(ideal, rel=0.1)


def set_rates(name: str) -> list[float]:
    """What the scheduler sets for torch's own optimizer, over a run."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], PEAK, momentum=0.9)
    scheduler = SCHEDULES[name](optimizer)
    rates = []
    for step in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < STEPS:
            advance(scheduler, 1.0)
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_set_and_tell_what_they_do_elsewhere(name: str) -> None:
    module = compiled(net(), 4)
    optimizer = KINDS["sgd"](module, lr=PEAK)
    scheduler = SCHEDULES[name](optimizer)
    found, told = [], []
    for step in range(STEPS):
        feed(module, step)
        found.append(optimizer.param_groups[0]["lr"])
        told.append(scheduler.get_last_lr()[0])
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == found[-1]
        if step + 1 < STEPS:
            advance(scheduler, 1.0)
    assert found == told == set_rates(name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "plateau", "one_cycle"])
def test_the_update_is_that_of_the_rate_it_used(kind: str, name: str) -> None:
    """Every kind of optimizer: as one does that goes by step, and is told these rates, and who has which turn."""
    ours, other = compiled(net(), 4), compiled(net(), 4)
    options = {"lr": PEAK, "weight_decay": 0.1, "max_grad_norm": 0.5}
    optimizer = KINDS[kind](ours, **options)
    by_step = KINDS[kind](other, **options, schedule_by="step")
    scheduler = SCHEDULES[name](optimizer)
    used = []
    for step in range(25):
        other.activate(ours.chunk)
        feed(ours, step)
        feed(other, step)
        optimizer.step()
        group, theirs = optimizer.param_groups[0], by_step.param_groups[0]
        theirs.update({k: v for k, v in group.items() if k not in ("params", "param_names")})
        (theirs["lr"],) = optimizer.last_rates
        by_step.step()
        assert by_step.last_rates == optimizer.last_rates
        used.append(optimizer.last_rates[0])
        advance(scheduler, 1.0)
    assert len(set(used)) < 25
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_groups_have_rates_of_their_own() -> None:
    module = compiled(net(), 3)
    optimizer = chunkft_fx.AdamW(module, no_decay=["*.bias"])
    optimizer.param_groups[1]["lr"] = 0.5
    scheduler = LambdaLR(optimizer, [lambda t: 1 - t / 16, lambda t: 1 - t / 32])
    used = []
    for step in range(9):
        feed(module, step)
        optimizer.step()
        scheduler.step()
        used.append(optimizer.last_rates)
    assert used[:3] == [(1e-3 * (1 - t / 16), 0.5 * (1 - t / 32)) for t in range(3)]
    assert used[3:6] == [pytest.approx((1e-3 * (12 + t) / 16, 0.5 * (28 + t) / 32)) for t in range(3)]
    assert used[6:] == [pytest.approx((1e-3 * 10 / 16, 0.5 * 26 / 32))] * 3


def test_a_rate_in_a_tensor_is_held_too() -> None:
    """Schedulers change such a rate in place."""
    module = compiled(net(), 2)
    optimizer = chunkft_fx.AdamW(module, lr=torch.tensor(1.0, dtype=torch.float64))
    for step, rate in enumerate([1.0, 1.0, 0.5, 0.25, 0.125]):
        optimizer.param_groups[0]["lr"].fill_(rate)
        feed(module, step)
        optimizer.step()
        assert optimizer.last_rates == ([1.0, 1.0, 0.5, 0.5, 0.125][step],)


def test_a_warm_up_from_0_takes_no_chunk_its_turn() -> None:
    module = compiled(net(), 4)
    optimizer = chunkft_fx.AdamW(module, lr=PEAK)
    scheduler = SCHEDULES["linear"](optimizer)
    seen = []
    for step in range(5):
        seen.append((module.chunk, float(optimizer.param_groups[0]["lr"]) > 0))
        feed(module, step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert seen == [(0, False), (0, True), (1, True), (2, True), (3, True)]


@pytest.mark.parametrize("stop", [2, 5, 11, 14, 23])
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_a_run_that_is_resumed_uses_the_same_rates_to_the_bit(stop: int, order: str) -> None:
    whole, _ = trained(order, range(STEPS // 2))
    _, saved = trained(order, range(stop))
    resumed, _ = trained(order, range(stop, STEPS // 2), saved)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def trained(order: str, steps: range, saved: bytes | None = None) -> tuple[dict[str, Tensor], bytes]:
    """Weights after these steps, and a checkpoint of everything."""
    module = compiled(net(), 5, order, 2)
    optimizer = chunkft_fx.AdamW(module, lr=PEAK, no_decay=["*.bias"])
    scheduler = SCHEDULES["cosine"](optimizer)
    if saved is not None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for what, state in zip((module, optimizer, scheduler), states, strict=True):
            what.load_state_dict(state)
    for step in steps:
        feed(module, step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    buffer = io.BytesIO()
    torch.save([what.state_dict() for what in (module, optimizer, scheduler)], buffer)
    return weights(module), buffer.getvalue()


def stepped(steps: int) -> tuple[CompiledModule, ChunkedOptimizer]:
    """A model of three chunks, and its optimizer after steps whose rates grow from 1."""
    module = compiled(net(), 3)
    optimizer = chunkft_fx.SGD(module)
    for step in range(steps):
        next_step(module, optimizer, 1.0 + step)
    return module, optimizer


def next_step(module: CompiledModule, optimizer: ChunkedOptimizer, rate: float) -> float:
    """The rate that a step uses where this one is set."""
    optimizer.param_groups[0]["lr"] = rate
    feed(module, 0)
    optimizer.step()
    optimizer.zero_grad()
    (used,) = optimizer.last_rates
    return float(used)


def test_a_checkpoint_from_before_there_were_rates_begins_them_anew() -> None:
    state = stepped(4)[1].state_dict()
    assert state["chunkft"].pop("rates")["chunks"] == 3
    state["chunkft"]["version"] = 1
    module, optimizer = stepped(0)
    optimizer.load_state_dict(state)
    assert module.chunk == 1
    assert [next_step(module, optimizer, rate) for rate in (9.0, 8.0)] == [9.0, 8.0]
    assert [next_step(module, optimizer, rate) for rate in (7.0, 6.0)] == [
        7.0,
        6.5,
    ]  # chunk 1 had 0.5 more than the mean


def test_rates_without_their_place_in_the_sweep_begin_anew() -> None:
    state = stepped(4)[1].state_dict()
    state["chunkft"]["position"] = None
    module, optimizer = stepped(0)
    optimizer.load_state_dict(state)
    assert [next_step(module, optimizer, rate) for rate in (9.0, 8.0)] == [9.0, 8.0]


def test_damaged_rates_are_refused_before_anything_changes() -> None:
    state = stepped(4)[1].state_dict()
    state["chunkft"]["rates"]["groups"][0]["owed"].pop()
    module, optimizer = stepped(2)
    before = weights(module)
    with pytest.raises(CheckpointMismatch, match=r"a sweep over 3 chunks, but values for \[2\]"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert (module.chunk, next_step(module, optimizer, 7.0)) == (2, 7.0)


def test_a_failed_step_leaves_the_rates_as_they_were() -> None:
    module, optimizer = stepped(3)
    optimizer.max_grad_norm = -1.0
    with pytest.raises(OptionError, match="max_grad_norm"):
        next_step(module, optimizer, 8.0)
    optimizer.max_grad_norm = None
    assert optimizer.last_rates == (3.0,)
    assert next_step(module, optimizer, 2.0) == 2.0 + 1.0  # chunk 0 had 1.0 where the mean was 2.0
    assert next_step(module, optimizer, 4.0) == 2.0


def test_by_step_a_rate_acts_at_once_and_the_choice_can_change() -> None:
    module, optimizer = stepped(4)
    optimizer.schedule_by = "step"
    assert [next_step(module, optimizer, rate) for rate in (9.0, 0.0, 8.0)] == [9.0, 0.0, 8.0]
    optimizer.schedule_by = "sweep"
    assert [next_step(module, optimizer, rate) for rate in (7.0, 6.0, 5.0, 4.0)] == [7.0, 6.0, 5.0, 4.5]


def test_a_choice_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="schedule_by='epoch' is not known; choose one of sweep, step"):
        chunkft_fx.AdamW(compiled(net()), schedule_by="epoch")
    module, optimizer = stepped(1)
    optimizer.schedule_by = "epoch"
    with pytest.raises(OptionError, match="schedule_by='epoch'"):
        next_step(module, optimizer, 1.0)


@pytest.mark.parametrize("update", ["step", "late", "backward"])
def test_where_a_step_covers_all_parameters_nothing_is_held(update: str) -> None:
    """To the bit, with either choice, a warm-up from 0 included; and so with one chunk."""
    runs = [covered(update, by) for by in ("sweep", "step")]
    assert [rates for _, rates in runs] == [set_rates("linear")[:6]] * 2
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))


def covered(update: str, by: str) -> tuple[list[Tensor], list[float]]:
    """Weights and used rates of a run of coverage all."""
    module = chunkft_fx.compile(tiny_lm(), "1GB", coverage="all", backend="eager")
    optimizer = chunkft_fx.AdamW(module, lr=PEAK, update=update, schedule_by=by)
    scheduler, used = SCHEDULES["linear"](optimizer), []
    for step in range(6):
        module(**lm_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        used += [float(rate) for rate in optimizer.last_rates]
    return [p.detach() for p in module.parameters()], used


def test_one_chunk_goes_by_step_whatever_its_interval() -> None:
    module = compiled(net(), 1, interval=5)
    optimizer = chunkft_fx.SGD(module)
    assert [next_step(module, optimizer, rate) for rate in (0.0, 3.0, 2.0)] == [0.0, 3.0, 2.0]
