"""Adafactor: equal to torch's on whole parameters, which chunks never cut, and in its bytes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import chunkft_fx
from chunkft_fx.copies.states.stage import FreshStage
from chunkft_fx.errors import (
    CheckpointMismatch,
    ChunkCountError,
    HostMemoryExceeded,
    OptimizerMismatch,
    OptionError,
)
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim import update as updates
from chunkft_fx.plan.state_spec import stage_capacity_nbytes
from tests.support.changing_batches import Text, attempt, text
from tests.support.changing_batches import compiled as compiled_text
from tests.support.slice_twin import SliceTwin
from tests.support.small_net import batch, compiled, feed, net, train_step
from tests.support.stream_machine import Machine, copied_stage, machine

__all__ = ["machine"]

OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
PARAMETERS = 10  # of the small net
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def is_whole(module: CompiledModule) -> bool:
    return all(s.is_whole for c in module.plan.chunks for s in c.slices)


@pytest.mark.parametrize(
    ("dtype", "options", "max_grad_norm"),
    [
        (torch.float64, OPTIONS, 0.05),
        (torch.float64, {"beta2_decay": -0.5, "eps": (1e-20, 1e-2), "d": 1.5}, None),
        (torch.float32, OPTIONS, None),
    ],
)
def test_one_chunk_equals_torch(dtype: torch.dtype, options: dict[str, Any], max_grad_norm: float | None) -> None:
    model, plain = compiled(net(dtype)), net(dtype)
    ours = chunkft_fx.Adafactor(model, **options, max_grad_norm=max_grad_norm)
    theirs = torch.optim.Adafactor(plain.parameters(), **options)
    schedules = [LinearLR(o, 0.1, total_iters=8) for o in (ours, theirs)]
    for step in range(8):
        train_step(model, ours, step, dtype)
        theirs.zero_grad()
        plain(batch(step, dtype)).backward()
        if max_grad_norm is not None:
            assert nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm) > max_grad_norm
        theirs.step()
        for schedule in schedules:
            schedule.step()
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance * 0.1, msg=name)


@settings(max_examples=40, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "lr": st.floats(1e-4, 1),
            "beta2_decay": st.floats(-1, 0),
            "eps": st.tuples(st.one_of(st.none(), st.floats(1e-8, 1e-3)), st.floats(1e-6, 0.1)),
            "d": st.floats(1, 3),
            "weight_decay": st.one_of(st.just(0.0), st.floats(0, 0.5)),
        }
    ),
    dtype=st.sampled_from(DTYPES),
    chunks=st.integers(1, PARAMETERS),
    order=st.sampled_from(["ascending", "descending", "random"]),
    interval=st.integers(1, 3),
    states=st.sampled_from(["keep", "reset"]),
    part=st.sampled_from([7, 30, 2**24]),
)
def test_whole_parameters_equal_torch(
    options: dict[str, Any], dtype: torch.dtype, chunks: int, order: str, interval: int, states: str, part: int
) -> None:
    module = compiled(net(dtype), chunks, order, interval)
    optimizer = chunkft_fx.Adafactor(module, **options, states=states)
    assert len(module.plan.chunks) == chunks
    assert is_whole(module)
    twin = SliceTwin(module, lambda p: torch.optim.Adafactor(p, **options), states == "reset", float32=2e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "PART_NUMEL", part)
        for step in range(min(3 * chunks * interval, 12)):
            twin.step(optimizer, step)


def test_a_rate_that_is_a_tensor() -> None:
    module = compiled(net(torch.float64))
    twin = SliceTwin(module, lambda p: torch.optim.Adafactor(p, **OPTIONS))
    optimizer = chunkft_fx.Adafactor(module, **OPTIONS | {"lr": torch.tensor(0.05, dtype=torch.float64)})
    for step in range(3):
        twin.step(optimizer, step)


def test_a_model_that_was_cut_within_parameters_is_planned_anew() -> None:
    module = compiled(net(), 5)
    assert not is_whole(module)
    optimizer = chunkft_fx.Adafactor(module)
    assert is_whole(module)
    assert {s.name for c in module.plan.chunks for s in c.slices} == {n for n, _ in module.named_parameters()}
    for step in range(5):
        train_step(module, optimizer, step, torch.float32)
    assert module.schedule.sweep == 1
    assert module._training.optimizer is optimizer


def test_it_comes_too_late_for_a_model_that_was_trained_in_parts() -> None:
    module = compiled(net(), 5)
    first = chunkft_fx.AdamW(module)
    feed(module, 0)
    first.step()
    with pytest.raises(OptimizerMismatch, match="Adafactor updates a parameter by numbers of its whole, but a chunk"):
        chunkft_fx.Adafactor(module)
    assert module._training.optimizer is first
    feed(module, 1)
    first.step()


def test_more_chunks_than_parameters_are_refused() -> None:
    module = compiled(net(), PARAMETERS + 1)
    first, plan = chunkft_fx.AdamW(module), module.plan
    with pytest.raises(ChunkCountError, match=f"chunks={PARAMETERS + 1}"):
        chunkft_fx.Adafactor(module)
    assert module._training.optimizer is first
    assert module.plan is plan


def test_a_part_of_a_parameter_is_never_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compiled(net(), 5)
    plan = module.plan
    optimizer = chunkft_fx.Adafactor(module)
    module._training.adopt(plan)
    feed(module, 0)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(OptimizerMismatch, match="of its whole"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("chunks", [3, "auto"])
def test_plans_are_made_for_it(comes_first: bool, chunks: int | str) -> None:
    module = compiled_text(Text().bfloat16(), "1GB", chunks=chunks)
    optimizer = chunkft_fx.Adafactor(module) if comes_first else None
    assert attempt(module, text(2, 8))
    module.zero_grad()
    if optimizer is None:
        optimizer = chunkft_fx.Adafactor(module)
    assert attempt(module, text(2, 8))
    assert module.plan.policy.states == optimizer.spec
    assert is_whole(module)
    parameters = dict(module.named_parameters())
    most = max(stage_capacity_nbytes(c, parameters, optimizer.spec) for c in module.plan.chunks)
    assert dict(module.plan.terms)["optimizer state of the active chunk"] == most
    optimizer.step()


def test_a_torch_checkpoint_continues_and_back() -> None:
    dtype = torch.float64
    straight, plain = net(dtype), net(dtype)
    optimizer, short = (torch.optim.Adafactor(m.parameters(), **OPTIONS) for m in (straight, plain))

    def train(model: nn.Module, one: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            one.zero_grad()
            model(batch(step, dtype)).backward()
            one.step()

    train(straight, optimizer, range(9))
    train(plain, short, range(3))
    middle = compiled(plain)
    ours = chunkft_fx.Adafactor(middle)
    ours.load_state_dict(short.state_dict())
    train(middle, ours, range(3, 6))
    plain = copy.deepcopy(plain)  # what a compiled module trains belongs to it
    last = torch.optim.Adafactor(plain.parameters())
    last.load_state_dict(ours.state_dict())
    train(plain, last, range(6, 9))
    for p, q in zip(plain.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_equals_an_uninterrupted_run(dtype: torch.dtype) -> None:
    straight = compiled(net(dtype), 5, "random", 2)
    optimizer = chunkft_fx.Adafactor(straight, **OPTIONS)
    for step in range(14):
        if step == 5:
            saved = copy.deepcopy({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
        feed(straight, step)
        optimizer.step()
    second = compiled(net(dtype, seed=9), 5, "random", 2)
    resumed = chunkft_fx.Adafactor(second)
    resumed.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["model"])
    for step in range(5, 14):
        feed(second, step)
        resumed.step()
    for p, q in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(row_var=s["row_var"].expand(8, 12)), r"row_var of 'wide' has shape \(8, 12\)"),
        (lambda s: s.pop("col_var"), "'wide' holds"),
        (lambda s: s.update(slice_steps=[[0, 6, 1], [6, 6, 2]]), "several step counts"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    optimizer = chunkft_fx.Adafactor(module := compiled(net()))
    feed(module, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"][0])
    with pytest.raises(CheckpointMismatch, match=message):
        optimizer.load_state_dict(saved)


def factored_nbytes(model: nn.Module, dtype: torch.dtype) -> int:
    wide = 8 if dtype == torch.float64 else 4
    count = 0
    for p in model.parameters():
        rest = p.numel() // (p.shape[-1] * p.shape[-2]) if p.ndim > 1 else 0
        count += rest * (p.shape[-1] + p.shape[-2]) if p.ndim > 1 else p.numel()
    return wide * count + (4 * sum(p.numel() for p in model.parameters()) if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_of_host_memory_and_stage_are_the_specs(dtype: torch.dtype) -> None:
    needed = factored_nbytes(net(), dtype)
    module = compiled(net(dtype), 5)
    optimizer = chunkft_fx.Adafactor(module, host_budget=needed)
    for step in range(5):
        feed(module, step)
        optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in held) == needed
    with pytest.raises(HostMemoryExceeded):
        chunkft_fx.Adafactor(compiled(net(dtype)), host_budget=needed - 1)
    resets = compiled(net(dtype), 5)
    forgetful = chunkft_fx.Adafactor(resets, states="reset")
    feed(resets, 0)
    forgetful.step()
    assert isinstance(forgetful.stage, FreshStage)
    assert forgetful.stage._arena.numel() == forgetful._states.capacity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_through_the_stage_equals_training_in_place(machine: Machine, dtype: torch.dtype) -> None:
    machine.chance = random.Random(1)
    inplace, staged = (compiled(net(dtype), 5, "random", 2) for _ in range(2))
    a, b = (chunkft_fx.Adafactor(m, **OPTIONS) for m in (inplace, staged))
    b._states.stage = copied_stage(b._states.capacity())
    for step in range(17):
        for module, optimizer in ((inplace, a), (staged, b)):
            feed(module, step)
            optimizer.step()
    for p, q in zip(inplace.parameters(), staged.parameters(), strict=True):
        assert torch.equal(p, q)
    for i, state in a.state_dict()["state"].items():
        for key, value in b.state_dict()["state"][i].items():
            assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"beta2_decay": 0.1},
        {"beta2_decay": float("nan")},
        {"eps": 1e-3},
        {"eps": (-1.0, 1e-3)},
        {"eps": (None, None)},
        {"d": 0.5},
        {"d": float("inf")},
        {"weight_decay": -0.1},
        {"states": "drop"},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        chunkft_fx.Adafactor(compiled(net()), **options)
