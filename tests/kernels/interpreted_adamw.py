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
from chunkft_fx.kernels.adamw.fused import launch_adamw
from chunkft_fx.kernels.adamw.reference import SliceUpdate, adamw_reference
from chunkft_fx.kernels.launch import LaunchOptions
from chunkft_fx.kernels.masters import join_master, split_master
from tests.kernels.operands import Spec, assert_same_memory, build, specs, spelled_out, ulps, wide_weight

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
    keeps_average=st.booleans(),
)
def test_kernel_equals_the_spelled_out_update(
    drawn: list[Spec],
    betas: tuple[float, float],
    weight_decay: float,
    seed: int,
    scale: float | None,
    keeps_average: bool,
) -> None:
    if betas[0] == 0:
        drawn = [dataclasses.replace(spec, has_exp_avg=keeps_average) for spec in drawn]
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
    a, b = wide_weight(ours), wide_weight(expected)
    is_small_step = (b - before).abs() < before.abs() / 4
    assert (ulps(a, b)[is_small_step] <= 1).all()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert ours.exp_avg is not None and expected.exp_avg is not None
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
    assert u.exp_avg is not None
    launch_adamw([u], **OPTIONS)
    for change in ({"exp_avg": u.exp_avg[:, ::2]}, {"gradient": u.gradient[:2]}, {"master": None}):
        with pytest.raises(OptionError):
            launch_adamw([dataclasses.replace(u, **change)], **OPTIONS)


def test_tiny_moments_are_not_flushed_and_what_is_not_finite_stays_so() -> None:
    kinds = [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
    for (dtype, is_remainder), state in itertools.product(kinds, [torch.float32, torch.bfloat16]):
        spec = dataclasses.replace(PLAIN, weight_dtype=dtype, state_dtype=state, is_remainder=is_remainder)
        ours, expected = build(spec), build(spec)
        for u in (ours.update, expected.update):
            u.gradient.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30])
            u.exp_avg_sq.view(-1)[3:6] = torch.tensor([0.0, 1e-42, 1e-40])
            u.weight[1, 0] = float("nan")
        launch_adamw([ours.update], **OPTIONS, seed=3)
        spelled_out(expected.update, 0, **OPTIONS, seed=3)
        assert ours.update.exp_avg is not None
        assert ours.update.weight.isnan().any() and ours.update.exp_avg.isinf().any()
        assert_same_memory(ours, expected)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_updates_of_remainders_equal_those_of_float32_masters(state_dtype: torch.dtype) -> None:
    drawn = [dataclasses.replace(PLAIN, state_dtype=state_dtype, dim=dim, step=1 + dim) for dim in (0, 1)]
    wide, narrow = ([build(spec).update for spec in drawn] for _ in range(2))
    for u in wide:
        assert u.master is not None
        u.master.copy_(u.weight)
    narrow = [dataclasses.replace(u, master=torch.zeros(u.weight.shape, dtype=torch.int16)) for u in narrow]
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        gradients = [torch.randn(u.weight.shape, generator=generator) for u in wide]
        for side in (wide, narrow):
            updates = [
                dataclasses.replace(u, gradient=g, step=u.step + step) for u, g in zip(side, gradients, strict=True)
            ]
            launch_adamw(updates, **OPTIONS, seed=step, launch=SMALL)
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(wide_weight(a), wide_weight(b))
        assert not torch.equal(wide_weight(a), a.weight.float())


def test_the_two_halves_of_a_master_are_those_of_the_reference() -> None:
    """Without a step nothing but the format changes a master: zeros, infinities, and what a remainder cannot move."""
    uppers = [0x0000, 0x0001, 0x007F, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]
    bits = torch.tensor([sign + upper for upper in uppers for sign in (-0x8000, 0)], dtype=torch.int16)
    remainder = torch.tensor([-(2**15), -1, 0, 1, 2**15 - 1], dtype=torch.int16).repeat(len(bits), 1)
    weight = bits.view(torch.bfloat16)[:, None].expand(remainder.shape).contiguous()
    expected, lower = split_master(join_master(weight, remainder))
    zeros = torch.zeros(remainder.shape)
    launch_adamw(
        [SliceUpdate(weight, zeros, remainder, None, zeros.clone(), 1)], **(OPTIONS | {"lr": 0.0, "beta1": 0.0})
    )
    assert torch.equal(weight.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(remainder, lower)


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
