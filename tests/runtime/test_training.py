"""Whole training runs: one chunk is torch's AdamW, several chunks are the reference loop."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import loss_of

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("family", "backend", "dtype"),
    [(family, "eager", torch.float32) for family in ("llama", "gpt2", "bert", "t5", "cnn")]
    + [(family, "inductor", torch.float64) for family in ("bert", "mlp")],
)
def test_one_chunk_equals_torch_adamw(family: str, backend: str, dtype: torch.dtype) -> None:
    """In float32 where operators are torch's own; compiled code sums in another order, so it is held in float64.

    The float64 families are those that compute nothing in float32 inside.
    """
    model, batch = tiny(family, dtype=dtype)
    plain = copy.deepcopy(model)
    compiled = chunkft_fx.compile(model, "64GB", chunks=1, backend=backend)
    ours = chunkft_fx.AdamW(compiled, **SETTINGS)
    theirs = torch.optim.AdamW(plain.parameters(), **SETTINGS)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1.0 - i / 40) for o in (ours, theirs)]
    for step in range(20):
        for module, optimizer in ((compiled, ours), (plain, theirs)):
            loss_of(module(**batch(2, 12, step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    ours_after, theirs_after = ([p.detach() for p in m.parameters()] for m in (compiled, plain))
    worst = max(float((a - b).abs().max()) for a, b in zip(ours_after, theirs_after, strict=True))
    assert worst <= 1e-6


def reference_step(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: int, lr: float) -> None:
    """One AdamW update of a slice, written out from the paper (arXiv 1711.05101, algorithm 2)."""
    beta1, beta2 = SETTINGS["betas"]
    parameter.mul_(1 - lr * SETTINGS["weight_decay"])
    state["m"].mul_(beta1).add_(gradient, alpha=1 - beta1)
    state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    m = state["m"] / (1 - beta1**steps)
    v = state["v"] / (1 - beta2**steps)
    parameter.sub_(lr * m / (v.sqrt() + SETTINGS["eps"]))


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_chunks_equal_a_loop_that_updates_only_the_active_slices(family: str, interval: int) -> None:
    """Dense gradients, three sweeps, step counts per slice; float64, so that only the schedule can differ."""
    model, batch = tiny(family, dtype=torch.float64)
    plain = copy.deepcopy(model)
    compiled = chunkft_fx.compile(model, "64GB", chunks=5, interval=interval, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, **SETTINGS)
    states: dict[Any, dict[str, Tensor]] = {}
    counts: dict[Any, int] = defaultdict(int)
    for step in range(3 * 5 * interval):
        assert compiled.chunk == step // interval % 5
        part = compiled.plan.chunks[compiled.chunk]
        plain.zero_grad()
        loss_of(plain(**batch(2, 12, step))).backward()
        loss_of(compiled(**batch(2, 12, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for s in part.slices:
                p = plain.get_parameter(s.name)
                assert p.grad is not None
                counts[s] += 1
                value, gradient = (t.narrow(s.dim, s.start, s.length) for t in (p, p.grad))
                state = states.setdefault(s, {"m": torch.zeros_like(gradient), "v": torch.zeros_like(gradient)})
                reference_step(value, gradient, state, counts[s], SETTINGS["lr"])
    for (name, a), (_, b) in zip(compiled.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_every_parameter_trains_in_a_sweep() -> None:
    model, batch = tiny("bert")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    compiled = chunkft_fx.compile(model, "64GB", chunks=4, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    for step in range(4):
        loss_of(compiled(**batch(2, 12, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [n for n, p in compiled.named_parameters() if torch.equal(p, before[n])]


def test_bfloat16_training_lowers_the_loss() -> None:
    model, batch = tiny("llama", dtype=torch.bfloat16)
    compiled = chunkft_fx.compile(model, "64GB", chunks=3, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, max_grad_norm=1.0)
    losses = []
    for _ in range(30):
        loss = loss_of(compiled(**batch(4, 12, 0)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(s["exp_avg"].dtype == s["master"].dtype == torch.float32 for s in optimizer.state.values())


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    def run(compiled: Any, optimizer: Any, batch: Any, steps: range) -> None:
        for step in steps:
            loss_of(compiled(**batch(2, 12, step))).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, batch = tiny("llama")
    whole = chunkft_fx.compile(
        copy.deepcopy(model), "64GB", chunks=4, interval=1, order="random", seed=3, backend="eager"
    )
    optimizer = chunkft_fx.AdamW(whole, **SETTINGS)
    run(whole, optimizer, batch, range(6))
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, batch, range(6, 14))
    model.load_state_dict(weights)
    resumed = chunkft_fx.compile(model, "64GB", chunks=4, interval=1, order="random", seed=3, backend="eager")
    again = chunkft_fx.AdamW(resumed, **SETTINGS)
    again.load_state_dict(state)
    run(resumed, again, batch, range(6, 14))
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
