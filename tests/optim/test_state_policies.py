"""State policies: moments in bfloat16, states that are dropped at a chunk switch, and bounded host memory."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.copies import host_memory
from chunkft_fx.copies.host_memory import PAGE_NBYTES, available_nbytes
from chunkft_fx.copies.states.stage import FreshStage
from chunkft_fx.copies.tier import LARGEST_SLAB
from chunkft_fx.errors import BudgetParseError, HostMemoryExceeded, OptionError
from chunkft_fx.graph.layout import front
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.optim.states import host_states as optim_host
from chunkft_fx.optim.states.host_states import HostStates, pack, require_room
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, StateTensor, stage_capacity_nbytes
from tests.optim.test_adamw import OPTIONS, Reference, assert_equal, fed, masks, train
from tests.support.small_net import batch, compiled, dense_gradients, net, train_step

BF16 = torch.bfloat16
NARROW = StateSpec("AdamW", (StateTensor("exp_avg", "bfloat16"), StateTensor("exp_avg_sq", "bfloat16")))
SPECS = {"float32": ASSUMED, "bfloat16": NARROW}


def test_the_second_moment_decays_in_bfloat16_too() -> None:
    model = compiled(net(BF16))
    optimizer = AdamW(model, lr=0.0, betas=(0.9, 0.999), state_dtype="bfloat16")
    train(model, optimizer, range(1), BF16)
    state = optimizer.state[model.head.weight]
    before = state["exp_avg_sq"].double()
    for _ in range(300):
        for s in model.active_slices():
            s.grad = torch.zeros(s.weight().shape)
        optimizer.step()
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype, state["master"].dtype) == (BF16, BF16, torch.float32)
    # Rounded to nearest, nothing would ever change; each rounding errs by half a bfloat16 step (2**-9) at random, and
    # 300 of them in 189 elements leave 0.3% of their mean.
    ratio = float((state["exp_avg_sq"].double() / before).mean())
    assert ratio == pytest.approx(0.999**300, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_bfloat16_moments_train_like_float32_ones(dtype: torch.dtype) -> None:
    losses = {}
    for state_dtype in ("float32", "bfloat16"):
        model = compiled(net(dtype), 3)
        optimizer = AdamW(model, lr=0.01, state_dtype=state_dtype)
        first = float(model._model(batch(0, dtype)).detach())
        for _ in range(60):
            train_step(model, optimizer, 0, dtype)
        losses[state_dtype] = float(model._model(batch(0, dtype)).detach())
        assert losses[state_dtype] < first / 2
        for p, state in optimizer.state.items():
            assert state["exp_avg"].dtype == {"float32": torch.float32, "bfloat16": BF16}[state_dtype]
            if dtype == BF16 and p is not model.unused:
                assert torch.equal(state["master"].to(dtype), p)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_float64_parameters_keep_float64_moments() -> None:
    models = [compiled(net(torch.float64), 3) for _ in range(2)]
    for model, state_dtype in zip(models, ("float32", "bfloat16"), strict=True):
        train(model, AdamW(model, **OPTIONS, state_dtype=state_dtype), range(6), torch.float64)
    assert_equal(models[0], models[1])


@pytest.mark.parametrize(
    ("options", "moments"), [({"state_dtype": "bfloat16"}, (1, 4, 7)), ({"states": "reset"}, (2, 8))]
)
def test_resume_equals_an_uninterrupted_run(options: dict[str, Any], moments: tuple[int, ...]) -> None:
    """Saved after so many of 20 steps; states that are not kept resume at a switch to another chunk alone."""
    straight = compiled(net(BF16), 5, "random", 2)
    optimizer = AdamW(straight, **OPTIONS, **options)
    saved = {}
    for step in range(20):
        if step in moments:
            saved[step] = io.BytesIO()
            torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, saved[step])
        train_step(straight, optimizer, step, BF16)
    second = compiled(net(BF16, seed=9), 5, "random", 2)
    for at, file in saved.items():
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        resumed = AdamW(second, **options)
        resumed.load_state_dict(loaded["optimizer"])
        second.load_state_dict(loaded["model"])
        train(second, resumed, range(at, 20), BF16)
        assert_equal(second, straight)


@pytest.mark.parametrize(("order", "interval"), [("ascending", 1), ("descending", 3), ("random", 2)])
def test_reset_states_equal_a_reference_that_forgets(order: str, interval: int) -> None:
    model, plain = compiled(net(torch.float64), 5, order, interval), net(torch.float64)
    optimizer, reference = AdamW(model, **OPTIONS, states="reset"), Reference(plain)
    previous = model.schedule.chunk
    for step in range(3 * 5 * interval):
        if model.schedule.chunk != previous:
            previous = model.schedule.chunk
            for tensors in reference.state.values():
                for t in tensors:
                    t.zero_()
        active = masks(model)
        train_step(model, optimizer, step, torch.float64)
        reference.step(dense_gradients(plain, plain(batch(step, torch.float64))), active)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_reset_masters_hold_what_bfloat16_weights_cannot() -> None:
    model, masters = compiled(net(BF16), 1), net(BF16).float()
    optimizer, reference = AdamW(model, lr=1e-4, states="reset"), torch.optim.AdamW(masters.parameters(), lr=1e-4)
    for _ in range(20):
        for s, p in zip(model.active_slices(), masters.parameters(), strict=True):
            s.grad = torch.ones(s.weight().shape)
            p.grad = torch.ones_like(p)
        optimizer.step()
        reference.step()
    for (name, p), q in zip(model.named_parameters(), masters.named_parameters(), strict=True):
        assert torch.equal(p, q[1].to(BF16)), name
    assert not torch.equal(model.wide, net(BF16).wide)


def test_reset_states_take_no_host_memory_and_one_chunk_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("host memory was asked for")

    monkeypatch.setattr(HostStates, "zeros", refuse)
    model = compiled(net(BF16), 5)
    optimizer = AdamW(model, states="reset", host_budget=1)
    fed(model, optimizer, range(11))
    assert all(state.keys() == {"slice_steps"} for state in optimizer.state.values())
    assert len(optimizer.state) == len({s.name for s in model.active_slices()})
    assert isinstance(optimizer._states.stage, FreshStage)
    assert optimizer._states.stage._arena.numel() == optimizer._states.capacity()


def test_a_checkpoint_of_reset_states_is_the_schedule_alone() -> None:
    model = compiled(net(BF16), 5)
    optimizer = AdamW(model, states="reset")
    fed(model, optimizer, range(8))
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    assert saved["chunkft"]["position"] == model.schedule.state_dict()
    keeps = compiled(net(BF16), 5)
    AdamW(keeps).load_state_dict(saved)
    assert keeps.schedule.state_dict() == model.schedule.state_dict()


def test_kept_states_are_not_loaded_where_none_are_kept() -> None:
    first = compiled(net(BF16), 5)
    optimizer = AdamW(first)
    fed(first, optimizer, range(8))
    second = compiled(net(BF16), 5)
    resets = AdamW(second, states="reset")
    resets.load_state_dict(optimizer.state_dict())
    assert second.schedule.state_dict() == first.schedule.state_dict()
    assert not resets.state


def test_moments_are_widened_or_rounded_to_the_nearest_by_loading() -> None:
    states = {}
    for state_dtype in ("float32", "bfloat16"):
        model = compiled(net(BF16), 2)
        optimizer = AdamW(model, state_dtype=state_dtype)
        fed(model, optimizer, range(4))
        states[state_dtype] = copy.deepcopy(optimizer.state_dict())
    for start, other, dtype in (("bfloat16", "float32", torch.float32), ("float32", "bfloat16", BF16)):
        optimizer = AdamW(compiled(net(BF16), 2), state_dtype=other)
        optimizer.load_state_dict(states[start])
        for i, state in states[start]["state"].items():
            loaded = optimizer.state_dict()["state"][i]
            assert loaded["exp_avg_sq"].dtype == dtype
            assert torch.equal(loaded["exp_avg_sq"], state["exp_avg_sq"].to(dtype))


@pytest.mark.parametrize("states", ["keep", "reset"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_step_makes_backwards_through_the_old_weights_stale(states: str, state_dtype: str) -> None:
    model = compiled(net(BF16), 2)
    optimizer = AdamW(model, states=states, state_dtype=state_dtype)
    model(batch(0, BF16)).backward()
    updated = [s.parameter for s in model.active_slices() if s.grad is not None]
    before = [p._version for p in updated]
    optimizer.step()
    assert all(p._version > v for p, v in zip(updated, before, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_dtype": "int8"}, OptionError, "state_dtype='int8'"),
        ({"states": "drop"}, OptionError, "states='drop'"),
        ({"host_budget": "lots"}, BudgetParseError, "'lots'"),
    ],
)
def test_unknown_policies_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW(compiled(net()), **options)


def needed_nbytes(dtype: torch.dtype, moments: torch.dtype) -> int:
    elements = sum(p.numel() for p in net().parameters())
    return elements * (2 * moments.itemsize + (4 if dtype == BF16 else 0))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_host_budget_is_exact(dtype: torch.dtype, state_dtype: str) -> None:
    needed = needed_nbytes(dtype, {"float32": torch.float32, "bfloat16": BF16}[state_dtype])
    AdamW(compiled(net(dtype)), state_dtype=state_dtype, host_budget=needed)
    with pytest.raises(HostMemoryExceeded) as caught:
        AdamW(compiled(net(dtype)), state_dtype=state_dtype, host_budget=needed - 1)
    assert (caught.value.needed_bytes, caught.value.limit_bytes) == (needed, needed - 1)
    message = str(caught.value)
    assert str(needed) in message
    assert 'states="reset"' in message
    assert "host_budget" in message
    assert ('state_dtype="bfloat16"' in message) == (state_dtype == "float32")
    AdamW(compiled(net(dtype)), states="reset", state_dtype=state_dtype, host_budget=needed - 1)


def test_without_a_host_budget_available_memory_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needed_nbytes(BF16, torch.float32)
    monkeypatch.setattr(optim_host, "available_nbytes", lambda: needed - 1)
    with pytest.raises(HostMemoryExceeded, match="available physical memory"):
        AdamW(compiled(net(BF16)))
    AdamW(compiled(net(BF16)), state_dtype="bfloat16")
    AdamW(compiled(net(BF16)), states="reset")
    AdamW(compiled(net(BF16)), host_budget=needed)  # the user knows better
    monkeypatch.setattr(optim_host, "available_nbytes", lambda: needed)
    AdamW(compiled(net(BF16)))


@pytest.mark.parametrize(("missing", "pinned", "is_enough"), [(0, True, True), (1, True, False), (0, False, False)])
def test_idle_pinned_memory_is_given_back_before_states_are_refused(
    monkeypatch: pytest.MonkeyPatch, missing: int, pinned: bool, is_enough: bool
) -> None:
    states = HostStates([torch.zeros(300, 300)], ASSUMED)
    available = [0]
    idle = states.nbytes(pinned) - missing
    monkeypatch.setattr(optim_host, "available_nbytes", lambda: sum(available))
    monkeypatch.setattr(optim_host, "release_idle_pinned", lambda: available.append(idle))
    with contextlib.nullcontext() if is_enough else pytest.raises(HostMemoryExceeded):
        require_room(states, pinned, None)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "500", "memory.stat": "active_file 1"}, None),
        (
            {
                "memory.max": "1000",
                "memory.current": "700",
                "memory.stat": "anon 600\nactive_file 30\ninactive_file 50",
            },
            380,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 60",
            },
            160,
        ),
        ({"memory.max": "1000", "memory.current": "1100", "memory.stat": ""}, 0),
    ],
)
def test_a_control_group_bounds_available_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left: int | None
) -> None:
    monkeypatch.setattr(host_memory, "CONTROL_GROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_nbytes() == left if left is not None else available_nbytes() > 2**20


@given(st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 3 * LARGEST_SLAB)), max_size=60))
def test_tensors_are_packed_apart_in_slabs_of_whole_pages(sizes: list[int]) -> None:
    places, slabs = pack(sizes)
    ends = [0] * len(slabs)
    for nbytes, (slab, offset) in zip(sizes, places, strict=True):
        assert offset % 256 == 0
        assert offset >= ends[slab]  # first fit only appends
        ends[slab] = offset + nbytes
    for end, slab_nbytes in zip(ends, slabs, strict=True):
        assert end <= slab_nbytes
        assert slab_nbytes % PAGE_NBYTES == 0
        assert slab_nbytes - end < PAGE_NBYTES
        assert slab_nbytes <= max(LARGEST_SLAB, max(sizes, default=0) + PAGE_NBYTES)


def test_pinned_states_take_the_bytes_that_were_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    device = torch.device("cuda")

    def pinned_zeros(nbytes: int, for_device: torch.device) -> Tensor:
        assert for_device == device
        taken.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(optim_host, "LARGEST_SLAB", 2048)
    monkeypatch.setattr(host_memory, "PAGE_NBYTES", 512)
    monkeypatch.setattr(optim_host, "pinned_zeros", pinned_zeros)
    parameters: Sequence[Tensor] = list(net(BF16).parameters())
    states = HostStates(parameters, NARROW)
    assert not taken
    made = [states.zeros(p, device) for p in parameters]
    assert len(taken) > 1
    assert sum(taken) == states.nbytes(pinned=True)
    for i, (p, tensors) in enumerate(zip(parameters, made, strict=True)):
        assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == {
            k: (layout.dtype, layout.shape) for k, layout in NARROW.layouts(p).items()
        }
        for t in tensors.values():
            assert not t.any()
            t.fill_(i + 1)
    assert all(bool((t == i + 1).all()) for i, tensors in enumerate(made) for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_the_stage_takes_what_the_planner_is_told(dtype: torch.dtype, state_dtype: str) -> None:
    model = compiled(net(dtype), 5)
    parameters = dict(model.named_parameters())
    spec = SPECS[state_dtype]
    for chunk in model.plan.chunks:
        stage = FreshStage(torch.device("cpu"), 0)
        states = [
            torch.empty(
                front(parameters[s.name], s.dim).narrow(0, s.start, s.length).shape, dtype=n.dtype, device="meta"
            )
            for s in chunk.slices
            for n in spec.layouts(parameters[s.name]).values()
        ]
        stage.announce(states)
        assert stage._arena.numel() == stage_capacity_nbytes(chunk, parameters, spec)
        assert [(t.shape, t.dtype) for t in stage.tensors()] == [(t.shape, t.dtype) for t in states]
        assert not any(bool(t.any()) for t in stage.tensors())
