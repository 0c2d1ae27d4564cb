"""The AdamW kernel in Triton's interpreter; `test_interpreted` runs this file in a process of its own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.adamw import launch_adamw
from chunkft_fx.kernels.adamw_reference import SliceUpdate, adamw_reference
from chunkft_fx.kernels.launch import LaunchOptions
from tests.kernels.operands import Spec, assert_same_memory, build, specs, spelled_out, ulps

# numpy says that a float16 weight overflowed, or that a nan was compared
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# small tiles and few programs: every program walks over several tiles and slices
SMALL = LaunchOptions(tile=64, on_host=3)
# Elements of a drawn parameter; more than a two-dimensional tile along each side, in some shapes.
MOST_NUMEL = 2300
PLAIN = Spec((9, 40), (0, 1), 0, 2, 5, torch.bfloat16, torch.float32, "front", 0, 3, 0)


@settings(max_examples=25)
@given(
    drawn=st.lists(specs(MOST_NUMEL), min_size=1, max_size=3),
    betas=st.sampled_from([(0.9, 0.999), (0.3, 0.5), (0.0, 0.99)]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([None, 0.37]),
)
def test_kernel_equals_the_spelled_out_update(
    drawn: list[Spec], betas: tuple[float, float], weight_decay: float, seed: int, scale: float | None
) -> None:
    options: dict[str, Any] = {
        "lr": 3e-3,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": 1e-8,
        "weight_decay": weight_decay,
    }
    factor = None if scale is None else torch.tensor(scale)
    ours, expected = ([build(spec) for spec in drawn] for _ in range(2))
    launch_adamw([c.update for c in ours], **options, scale=factor, seed=seed, launch=SMALL)
    for index, case in enumerate(expected):
        spelled_out(case.update, index, **options, scale=factor, seed=seed)
    for a, b in zip(ours, expected, strict=True):
        assert_same_memory(a, b)


@settings(max_examples=20)
@given(spec=specs(MOST_NUMEL))
def test_weights_equal_those_of_torch_to_one_ulp(spec: Spec) -> None:
    spec = dataclasses.replace(spec, state_dtype=torch.float32)
    ours, expected = build(spec).update, build(spec).update
    launch_adamw([ours], **OPTIONS)
    before = build(spec).update.weight.float()
    adamw_reference([expected], **OPTIONS)
    a, b = (u.weight if u.master is None else u.master.view(u.weight.shape) for u in (ours, expected))
    is_small_step = (b - before).abs() < before.abs() / 4
    assert (ulps(a, b)[is_small_step] <= 1).all()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.exp_avg, expected.exp_avg, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.exp_avg_sq, expected.exp_avg_sq, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_may_be_a_tensor(dtype: torch.dtype) -> None:
    lr = torch.tensor(3e-3, dtype=dtype)
    ours, expected = build(PLAIN), build(PLAIN)
    launch_adamw([ours.update], **(OPTIONS | {"lr": lr}))
    spelled_out(expected.update, 0, **(OPTIONS | {"lr": float(lr)}))
    assert_same_memory(ours, expected)


def test_slices_met_before_take_each_steps_numbers() -> None:
    drawn = [PLAIN, dataclasses.replace(PLAIN, state_dtype=torch.bfloat16, dim=1, step=9)]
    ours, expected = ([build(spec) for spec in drawn] for _ in range(2))
    for step in range(4):
        options = OPTIONS | {"lr": 1e-2 / (1 + step), "weight_decay": 0.1 * step}
        launch_adamw([dataclasses.replace(c.update, step=1 + step) for c in ours], **options, seed=step)
        for index, case in enumerate(expected):
            spelled_out(dataclasses.replace(case.update, step=1 + step), index, **options, seed=step)
    for a, b in zip(ours, expected, strict=True):
        assert_same_memory(a, b)


def test_a_slice_at_a_known_address_is_checked_again_when_it_lies_otherwise() -> None:
    u = build(PLAIN).update
    launch_adamw([u], **OPTIONS)
    for change in ({"exp_avg": u.exp_avg[:, ::2]}, {"gradient": u.gradient[:2]}, {"master": None}):
        with pytest.raises(OptionError):
            launch_adamw([dataclasses.replace(u, **change)], **OPTIONS)


def test_tiny_moments_are_not_flushed_and_what_is_not_finite_stays_so() -> None:
    for dtype, state in itertools.product([torch.bfloat16, torch.float32], [torch.float32, torch.bfloat16]):
        ours, expected = (build(dataclasses.replace(PLAIN, weight_dtype=dtype, state_dtype=state)) for _ in range(2))
        for u in (ours.update, expected.update):
            u.gradient.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30])
            u.exp_avg_sq.view(-1)[3:6] = torch.tensor([0.0, 1e-42, 1e-40])
            u.weight[1, 0] = float("nan")
        launch_adamw([ours.update], **OPTIONS, seed=3)
        spelled_out(expected.update, 0, **OPTIONS, seed=3)
        assert ours.update.weight.isnan().any() and ours.update.exp_avg.isinf().any()
        assert_same_memory(ours, expected)


def test_bfloat16_second_moment_decays() -> None:
    numel, steps = 4096, 40
    zeros = torch.zeros(numel)
    average, square = zeros.bfloat16(), torch.ones(numel).bfloat16()
    nearest = square.clone()
    for step in range(1, steps + 1):
        u = SliceUpdate(zeros.clone(), zeros, None, average, square, step)
        launch_adamw([u], **OPTIONS, seed=step, launch=LaunchOptions(tile=numel))
        nearest = (nearest.float() * 0.999).bfloat16()
    assert (nearest == 1).all()
    # one rounding moves at most 2**-8, so that the mean of 4096 elements is good to 2e-4 (one sigma)
    assert abs(square.float().mean().item() - 0.999**steps) < 1e-3


def test_dimensions_beyond_three_are_refused() -> None:
    weight = torch.zeros(3, 4, 5, 6).permute(3, 2, 1, 0)
    gradient = torch.zeros(weight.shape)
    u = SliceUpdate(weight, gradient, None, torch.zeros(weight.shape), torch.zeros(weight.shape), 1)
    with pytest.raises(OptionError, match="make the parameter contiguous"):
        launch_adamw([u], **OPTIONS)
