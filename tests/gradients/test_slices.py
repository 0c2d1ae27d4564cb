"""Active slices and the schedule: gradient accumulation, orders, intervals, and saved positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.schedule import ORDERS, ChunkSchedule


def test_weight_is_a_view_of_the_parameter() -> None:
    parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    active = ActiveSlice(Slice("w", 1, 1, 2, 4), parameter)
    active.weight().zero_()
    assert parameter.tolist() == [[0, 0, 0, 3], [4, 0, 0, 7], [8, 0, 0, 11]]


def test_a_scalar_parameter_is_one_whole_slice() -> None:
    parameter = nn.Parameter(torch.tensor(2.0))
    assert ActiveSlice(Slice("s", 0, 0, 1, 1), parameter).weight().shape == ()


def give(active: ActiveSlice, gradient: Tensor) -> None:
    """What a backward does with a slice's gradient, the parameter's dtype being said as a compiled module says it."""
    give_last(active, [gradient])


def give_last(active: ActiveSlice, gradients: list[Tensor]) -> None:
    """The same with a gradient that nothing else needs to hold."""

    class Handing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, parameter: Tensor) -> Tensor:
            return torch.zeros(())

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Tensor:
            return active.handed(gradients.pop())

    active.parameter.grad_dtype = torch.promote_types(active.parameter.dtype, torch.float32)
    Handing.apply(active.parameter).backward()


@pytest.mark.parametrize("part", [Slice("w", 0, 1, 2, 4), Slice("w", 0, 0, 4, 4)])
def test_only_a_gradient_made_wider_than_its_parameter_is_kept_without_a_copy(part: Slice) -> None:
    """Autograd may give one tensor as the gradient of two parameters; then it has their dtype."""
    for dtype, is_kept in ((torch.bfloat16, True), (torch.float32, False)):
        active = ActiveSlice(part, nn.Parameter(torch.zeros(4, 3, dtype=dtype)))
        gradients = [torch.ones(part.length, 3)]
        address = gradients[0].data_ptr()
        give_last(active, gradients)
        assert active.grad is not None
        assert (active.grad.data_ptr() == address) == is_kept
        give(active, torch.ones(part.length, 3))
        assert active.grad.tolist() == [[2.0] * 3] * part.length


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_gradients_add_up_in_the_wide_dtype(dtype: torch.dtype, wide: torch.dtype) -> None:
    active = ActiveSlice(Slice("w", 0, 1, 2, 4), nn.Parameter(torch.zeros(4, 3, dtype=dtype)))
    gradient = torch.full((2, 3), 1.0, dtype=dtype)
    give(active, gradient)
    assert active.grad is not None
    assert active.grad.dtype == wide
    # 1 + 1/512 is not representable in bfloat16: the sum must not be rounded to it.
    give(active, torch.full((2, 3), 2.0**-9, dtype=dtype))
    assert torch.equal(active.grad, torch.full((2, 3), 1 + 2.0**-9, dtype=wide))
    assert torch.equal(gradient, torch.ones_like(gradient))


@given(st.integers(1, 9), st.sampled_from(ORDERS), st.integers(1, 3), st.integers(0, 5))
def test_every_sweep_visits_every_chunk_for_its_interval(chunks: int, order: str, interval: int, seed: int) -> None:
    schedule = ChunkSchedule(chunks, order, interval, seed)
    for _ in range(3):
        visited = []
        for _ in range(chunks * interval):
            visited.append(schedule.chunk)
            before = schedule.chunk
            assert schedule.advance() == (schedule.chunk != before)
        held = [visited[i : i + interval] for i in range(0, len(visited), interval)]
        assert all(len(set(h)) == 1 for h in held)
        assert sorted(h[0] for h in held) == list(range(chunks))


def test_orders() -> None:
    assert ChunkSchedule(3, "ascending").permutation(5) == [0, 1, 2]
    assert ChunkSchedule(3, "descending").permutation(5) == [2, 1, 0]
    first = ChunkSchedule(20, "random", seed=1)
    assert first.permutation(0) == ChunkSchedule(20, "random", seed=1).permutation(0)
    assert first.permutation(0) != first.permutation(1)
    assert first.permutation(0) != ChunkSchedule(20, "random", seed=2).permutation(0)


@given(st.integers(1, 7), st.sampled_from(ORDERS), st.integers(1, 3), st.integers(0, 40))
def test_a_saved_position_continues_the_sweep(chunks: int, order: str, interval: int, steps: int) -> None:
    schedule = ChunkSchedule(chunks, order, interval)
    for _ in range(steps):
        schedule.advance()
    resumed = ChunkSchedule(chunks, order, interval)
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(2 * chunks * interval):
        assert resumed.chunk == schedule.chunk
        assert resumed.advance() == schedule.advance()


def test_a_position_of_another_number_of_chunks_changes_nothing() -> None:
    schedule = ChunkSchedule(5)
    schedule.advance()
    before = schedule.state_dict()
    with pytest.warns(ChunkFTWarning, match="saved with 4 chunks and means nothing with 5"):
        schedule.load_state_dict(ChunkSchedule(4, sweep=3, position=2).state_dict())
    assert schedule.state_dict() == before


@pytest.mark.parametrize(
    "change", [{"sweep": None}, {"position": 5}, {"position": -1}, {"steps": 1.5}, {"chunks": "5"}]
)
def test_something_else_is_not_a_position(change: dict[str, Any]) -> None:
    schedule = ChunkSchedule(5)
    with pytest.raises(CheckpointMismatch, match="not a position"):
        schedule.load_state_dict(schedule.state_dict() | change)
    assert schedule.state_dict() == ChunkSchedule(5).state_dict()


def test_activate_jumps_within_the_sweep() -> None:
    schedule = ChunkSchedule(4, "descending", interval=2)
    schedule.advance()
    schedule.activate(1)
    assert (schedule.chunk, schedule.steps) == (1, 0)
    schedule.advance()
    schedule.advance()
    assert schedule.chunk == 0


@pytest.mark.parametrize("chunk", [-1, 4])
def test_a_chunk_that_does_not_exist_is_refused(chunk: int) -> None:
    with pytest.raises(OptionError, match="chunks 0 to 3"):
        ChunkSchedule(4).activate(chunk)


@pytest.mark.parametrize(("order", "interval"), [("upwards", 1), ("ascending", 0), ("ascending", 1.5)])
def test_unknown_orders_and_intervals_are_refused(order: str, interval: Any) -> None:
    with pytest.raises(OptionError, match=r"order=|interval="):
        ChunkSchedule(2, order, interval)
