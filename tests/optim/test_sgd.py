"""SGD: equal to torch's on the plain model, on slices cut anywhere, from checkpoint to checkpoint, and in its bytes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import chunkft_fx
from chunkft_fx.copies.states.stage import FreshStage
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, HostMemoryExceeded, OptimizerConflict, OptionError
from chunkft_fx.gradients.slice_gradient import cut_from
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim import update as updates
from chunkft_fx.optim.rules import sgd
from chunkft_fx.optim.update import Part
from chunkft_fx.plan.state_spec import stage_capacity_nbytes
from tests.support.changing_batches import Text, attempt, text
from tests.support.changing_batches import compiled as compiled_text
from tests.support.slice_twin import SliceTwin
from tests.support.small_net import batch, compiled, feed, net, train_step
from tests.support.stream_machine import Machine, copied_stage, machine

__all__ = ["machine"]

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("dtype", "options", "max_grad_norm"),
    [
        (torch.float32, OPTIONS | {"nesterov": True}, 0.05),
        (torch.float64, OPTIONS | {"dampening": 0.3}, None),
        (torch.float32, {"lr": 0.1, "weight_decay": 0.01}, None),
    ],
)
def test_one_chunk_equals_torch_to_the_bit(
    dtype: torch.dtype, options: dict[str, Any], max_grad_norm: float | None
) -> None:
    model, plain = compiled(net(dtype)), net(dtype)
    ours = chunkft_fx.SGD(model, **options, max_grad_norm=max_grad_norm)
    theirs = torch.optim.SGD(plain.parameters(), **options, foreach=False)
    schedules = [
        OneCycleLR(o, max_lr=0.1, total_steps=10, cycle_momentum="momentum" in options) for o in (ours, theirs)
    ]
    for step in range(8):
        train_step(model, ours, step, dtype)
        theirs.zero_grad()
        plain(batch(step, dtype)).backward()
        if max_grad_norm is not None:
            assert nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm) > max_grad_norm
        theirs.step()
        for schedule in schedules:
            schedule.step()
        assert_equal(model, plain)
    assert ours.param_groups[0]["momentum"] == theirs.param_groups[0]["momentum"]


@st.composite
def hyperparameters(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.one_of(st.just(0.0), st.floats(0.01, 0.99)))
    is_nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.floats(0, 1)),
        "momentum": momentum,
        "dampening": 0.0 if is_nesterov else draw(st.floats(-0.5, 1)),
        "weight_decay": draw(st.one_of(st.just(0.0), st.floats(0, 0.5))),
        "nesterov": is_nesterov,
    }


@settings(max_examples=40, deadline=None)
@given(
    options=hyperparameters(),
    dtype=st.sampled_from(DTYPES),
    chunks=st.integers(1, 30),
    order=st.sampled_from(["ascending", "descending", "random"]),
    interval=st.integers(1, 3),
    states=st.sampled_from(["keep", "reset"]),
    part=st.sampled_from([7, 2**24]),
)
def test_slices_cut_anywhere_equal_torch(
    options: dict[str, Any], dtype: torch.dtype, chunks: int, order: str, interval: int, states: str, part: int
) -> None:
    module = compiled(net(dtype), chunks, order, interval)
    twin = SliceTwin(module, lambda p: torch.optim.SGD(p, **options), forgets=states == "reset")
    optimizer = chunkft_fx.SGD(module, **options, states=states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "PART_NUMEL", part)
        for step in range(min(3 * chunks * interval, 12)):
            twin.step(optimizer, step)


def parts(step: int) -> list[Part]:
    generator = torch.Generator().manual_seed(step)
    shapes = [(4, 3), (5,), (2, 2, 2)]
    drawn = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    return [Part(w, g, {sgd.BUFFER: b}, step) for w, g, b in zip(*drawn, strict=True)]


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_foreach_functions_do_the_same_and_leave_gradients(step: int, nesterov: bool, decay: float) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": decay, "nesterov": nesterov}
    one, many, given = parts(step), parts(step), parts(step)
    sgd.update(one, options, foreach=False)
    sgd.update(many, options, foreach=True)
    for a, b, before in zip(one, many, given, strict=True):
        torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(a.states[sgd.BUFFER], b.states[sgd.BUFFER])
        assert torch.equal(a.gradient, before.gradient)
        assert torch.equal(b.gradient, before.gradient)
        assert not torch.equal(a.weight, before.weight)


def test_clipping_scales_what_the_update_reads() -> None:
    module = compiled(net(torch.float64), 3)
    twin = SliceTwin(module, lambda p: torch.optim.SGD(p, **OPTIONS))
    optimizer = chunkft_fx.SGD(module, **OPTIONS, max_grad_norm=0.5)
    for step in range(7):
        feed(module, step)
        norm = torch.cat([s.grad.flatten() for s in module.active_slices() if s.grad is not None]).norm()
        twin.step(optimizer, step, scale=float(0.5 / (norm + 1e-6)))
        torch.testing.assert_close(optimizer.last_grad_norm, norm)


def test_no_decay_and_a_weight_changed_from_outside() -> None:
    module = compiled(net(torch.bfloat16))
    optimizer = chunkft_fx.SGD(module, lr=0.5, weight_decay=0.5, no_decay=("*.bias",))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for _ in range(2):
        for s in module.active_slices():
            s.grad = torch.zeros(s.weight().shape)
        optimizer.step()
        with torch.no_grad():
            module.wide.fill_(4.0)
    assert torch.equal(module.head.bias, before["head.bias"])
    assert torch.equal(module.head.weight, (before["head.weight"].float() * 0.75**2).bfloat16())
    assert torch.equal(optimizer.state[module.wide]["master"], before["wide"].float().new_full((8, 12), 3.0))


def test_a_torch_checkpoint_continues_to_the_bit_and_back() -> None:
    options = OPTIONS | {"dampening": 0.5}  # so that a first step differs from a later one
    straight, plain = net(), net()
    optimizer, short = (torch.optim.SGD(m.parameters(), **options, foreach=False) for m in (straight, plain))

    def train(model: nn.Module, one: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            one.zero_grad()
            model(batch(step)).backward()
            one.step()

    train(straight, optimizer, range(9))
    train(plain, short, range(3))
    middle = compiled(plain)
    ours = chunkft_fx.SGD(middle, momentum=0.9)
    ours.load_state_dict(short.state_dict())
    train(middle, ours, range(3, 6))
    plain = copy.deepcopy(plain)  # what a compiled module trains belongs to it
    last = torch.optim.SGD(plain.parameters(), momentum=0.9, foreach=False)
    last.load_state_dict(ours.state_dict())
    train(plain, last, range(6, 9))
    assert_equal(plain, straight)


@pytest.mark.parametrize(("dtype", "momentum"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 0.9)])
def test_resume_equals_an_uninterrupted_run(dtype: torch.dtype, momentum: float) -> None:
    straight = compiled(net(dtype), 5, "random", 2)
    optimizer = chunkft_fx.SGD(straight, **OPTIONS | {"momentum": momentum})
    for step in range(14):
        if step == 5:
            saved = copy.deepcopy({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
        feed(straight, step)
        optimizer.step()
    second = compiled(net(dtype, seed=9), 5, "random", 2)
    resumed = chunkft_fx.SGD(second, momentum=momentum)
    resumed.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["model"])
    for step in range(5, 14):
        feed(second, step)
        resumed.step()
    assert_equal(second, straight)
    expected = {sgd.BUFFER, "master", "slice_steps"} - ({sgd.BUFFER} if not momentum else set())
    expected -= {"master"} if dtype == torch.float32 else set()
    assert all(state.keys() == expected for state in saved["optimizer"]["state"].values())


class Elements:
    """SGD written out, with a momentum and a step count for each element."""

    def __init__(self, module: CompiledModule) -> None:
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.momenta = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.steps = {n: torch.zeros_like(w) for n, w in self.weights.items()}

    def step(self, module: CompiledModule, lr: float, momentum: float, dampening: float, weight_decay: float) -> None:
        for s in module.active_slices():
            assert s.grad is not None
            w, m, steps = (cut_from(t[s.name], s.slice) for t in (self.weights, self.momenta, self.steps))
            gradient = s.grad + weight_decay * w
            m.copy_(torch.where(steps == 0, gradient, momentum * m + (1 - dampening) * gradient))
            w.sub_(lr * m)
            steps.add_(1)


def test_another_number_of_chunks_goes_on_with_steps_per_slice() -> None:
    options = OPTIONS | {"dampening": 0.5}  # so that a first step differs from a later one
    model = net(torch.float64)
    first = compiled(model, 5)
    optimizer, reference = chunkft_fx.SGD(first, **options), Elements(first)
    for step in range(7):
        feed(first, step)
        reference.step(first, **options)
        optimizer.step()
    second = compiled(copy.deepcopy(model), 2)
    resumed = chunkft_fx.SGD(second, **options)
    with pytest.warns(ChunkFTWarning, match="saved with 5 chunks"):
        resumed.load_state_dict(optimizer.state_dict())
    assert any(len(state["slice_steps"]) > 1 for state in resumed.state.values())
    for step in range(7, 12):
        feed(second, step)
        reference.step(second, **options)
        resumed.step()
        for name, p in second.named_parameters():
            torch.testing.assert_close(p.detach(), reference.weights[name], rtol=1e-12, atol=1e-14)


def element_nbytes(dtype: torch.dtype, momentum: float) -> int:
    wide = 8 if dtype == torch.float64 else 4
    return (wide if momentum else 0) + (4 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_of_host_memory_and_stage_are_the_specs(dtype: torch.dtype, momentum: float) -> None:
    needed = sum(p.numel() for p in net().parameters()) * element_nbytes(dtype, momentum)
    module = compiled(net(dtype), 5)
    optimizer = chunkft_fx.SGD(module, momentum=momentum, host_budget=max(needed, 1))
    for step in range(5):
        feed(module, step)
        optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in held) == needed
    if needed:
        with pytest.raises(HostMemoryExceeded, match='states="reset"') as caught:
            chunkft_fx.SGD(compiled(net(dtype)), momentum=momentum, host_budget=needed - 1)
        assert "state_dtype" not in str(caught.value)  # it has no such option
    resets = compiled(net(dtype), 5)
    forgetful = chunkft_fx.SGD(resets, momentum=momentum, states="reset")
    feed(resets, 0)
    forgetful.step()
    parameters = dict(resets.named_parameters())
    most = max(stage_capacity_nbytes(c, parameters, forgetful.spec) for c in resets.plan.chunks)
    assert isinstance(forgetful.stage, FreshStage)
    assert forgetful.stage._arena.numel() == most == forgetful._states.capacity()


@pytest.mark.parametrize("comes_first", [True, False])
def test_plans_are_made_for_its_states(comes_first: bool) -> None:
    module = compiled_text(Text().bfloat16(), "1GB", chunks=3)
    optimizer = chunkft_fx.SGD(module, momentum=0.9) if comes_first else None
    assert attempt(module, text(2, 8))
    optimizer = optimizer or chunkft_fx.SGD(module, momentum=0.9)
    module.zero_grad()
    assert attempt(module, text(2, 8))
    assert module.plan.policy.states == optimizer.spec
    parameters = dict(module.named_parameters())
    most = max(stage_capacity_nbytes(c, parameters, optimizer.spec) for c in module.plan.chunks)
    assert dict(module.plan.terms)["optimizer state of the active chunk"] == most
    optimizer.step()


@pytest.mark.parametrize(("dtype", "momentum"), [(torch.bfloat16, 0.9), (torch.float32, 0.9), (torch.float32, 0.0)])
def test_training_through_the_stage_equals_training_in_place(
    machine: Machine, dtype: torch.dtype, momentum: float
) -> None:
    machine.chance = random.Random(1)
    inplace, staged = (compiled(net(dtype), 5, "random", 2) for _ in range(2))
    a, b = (chunkft_fx.SGD(m, **OPTIONS | {"momentum": momentum}) for m in (inplace, staged))
    b._states.stage = copied_stage(b._states.capacity())
    for step in range(17):
        for module, optimizer in ((inplace, a), (staged, b)):
            feed(module, step)
            optimizer.step()
    assert_equal(inplace, staged)
    for i, state in a.state_dict()["state"].items():
        for key, value in b.state_dict()["state"][i].items():
            assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"weight_decay": -0.1},
        {"dampening": float("inf")},
        {"dampening": "some"},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"states": "drop"},
        {"max_grad_norm": 0.0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        chunkft_fx.SGD(compiled(net()), **options)


@pytest.mark.parametrize(("made", "later"), [(0.9, 0.0), (0.0, 0.9)])
def test_momentum_that_would_change_which_states_there_are_is_refused(made: float, later: float) -> None:
    module = compiled(net())
    optimizer = chunkft_fx.SGD(module, momentum=made)
    before = copy.deepcopy(module.state_dict())
    optimizer.param_groups[0]["momentum"] = later
    feed(module, 0)
    with pytest.raises(OptionError, match="make a new optimizer"):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_switches_that_only_torch_has_are_refused() -> None:
    module = compiled(net())
    optimizer = chunkft_fx.SGD(module)
    optimizer.param_groups[0]["maximize"] = True
    feed(module, 0)
    with pytest.raises(OptionError, match=r"chunkft_fx\.SGD has no maximize"):
        optimizer.step()


def test_checkpoints_of_other_optimizers_are_refused() -> None:
    module = compiled(net())
    saved = chunkft_fx.AdamW(module).state_dict()
    optimizer = chunkft_fx.SGD(compiled(net()), momentum=0.9)
    with pytest.raises(CheckpointMismatch, match="not saved by an SGD optimizer"):
        optimizer.load_state_dict(saved)
    with pytest.raises(CheckpointMismatch, match="not saved by an AdamW optimizer"):
        chunkft_fx.AdamW(compiled(net())).load_state_dict(optimizer.state_dict())


def test_the_latest_optimizer_of_any_kind_is_followed() -> None:
    module = compiled(net())
    first = chunkft_fx.AdamW(module)
    chunkft_fx.SGD(module)
    feed(module, 0)
    with pytest.raises(OptimizerConflict, match="another optimizer"):
        first.step()
