"""The AdamW kernel for 8-bit moments in the interpreter; `test_interpreted` runs this file in its own process."""

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
from chunkft_fx.kernels.adamw.reference import adamw_reference
from chunkft_fx.kernels.launch import LaunchOptions
from tests.kernels.operands import Spec, assert_same_memory, build, specs, spelled_out, wide_weight

# numpy says that a float16 weight overflowed, or that a nan was compared
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
PLAIN = Spec((9, 300), (0, 1), 0, 2, 5, torch.bfloat16, torch.uint8, "front", 0, 3, 0)
# one block at a time, and several of which the last tile has fewer; few programs for them
LAUNCHES = (LaunchOptions(tile=256, on_host=3), LaunchOptions(tile=1024, on_host=2))


@settings(max_examples=20)
@given(
    drawn=st.lists(specs(2300), min_size=1, max_size=3),
    betas=st.sampled_from([(0.9, 0.999), (0.3, 0.5), (0.0, 0.99)]),
    scale=st.sampled_from([None, 0.37]),
    launch=st.sampled_from(LAUNCHES),
    keeps_average=st.booleans(),
)
def test_kernel_equals_the_spelled_out_update(
    drawn: list[Spec], betas: tuple[float, float], scale: float | None, launch: LaunchOptions, keeps_average: bool
) -> None:
    has_average = betas[0] != 0 or keeps_average
    drawn = [dataclasses.replace(spec, state_dtype=torch.uint8, has_exp_avg=has_average) for spec in drawn]
    options = OPTIONS | {"beta1": betas[0], "beta2": betas[1]}
    factor = None if scale is None else torch.tensor(scale)
    ours, expected = ([build(spec) for spec in drawn] for _ in range(2))
    launch_adamw([c.update for c in ours], **options, scale=factor, launch=launch)
    for index, case in enumerate(expected):
        spelled_out(case.update, index, **options, scale=factor)
    for a, b in zip(ours, expected, strict=True):
        assert_same_memory(a, b)


@pytest.mark.parametrize(
    ("row", "launch"), [(63, 0), (257, 0), (1, 1), (255, 1), (256, 1), (257, 1), (512, 1), (700, 1)]
)
def test_blocks_of_every_length_take_several_steps(row: int, launch: int) -> None:
    kinds = itertools.product([False, True], ["front", "same"])
    drawn = [
        dataclasses.replace(
            PLAIN, shape=(4, row), start=1, length=3, is_remainder=is_remainder, gradient_order=order, seed=row
        )
        for is_remainder, order in kinds
    ]
    drawn.append(dataclasses.replace(PLAIN, shape=(row, 4), dim=1, start=1, length=3))  # weights read across their rows
    ours, expected = ([build(spec) for spec in drawn] for _ in range(2))
    for step in range(2):
        launch_adamw([dataclasses.replace(c.update, step=3 + step) for c in ours], **OPTIONS, launch=LAUNCHES[launch])
        for index, case in enumerate(expected):
            spelled_out(dataclasses.replace(case.update, step=3 + step), index, **OPTIONS)
    for a, b in zip(ours, expected, strict=True):
        assert_same_memory(a, b)


@settings(max_examples=15)
@given(spec=specs(2300))
def test_the_reference_is_one_code_apart_where_rounding_differs(spec: Spec) -> None:
    """torch's AdamW contracts multiplications and additions, so that a moment in the middle of two codes may go up."""
    spec = dataclasses.replace(spec, state_dtype=torch.uint8)
    ours, expected = build(spec).update, build(spec).update
    launch_adamw([ours], **OPTIONS)
    adamw_reference([expected], **OPTIONS)
    torch.testing.assert_close(wide_weight(ours), wide_weight(expected), rtol=1e-6, atol=1e-8)
    for a, b in ((ours.exp_avg, expected.exp_avg), (ours.exp_avg_sq, expected.exp_avg_sq)):
        assert a is not None and b is not None
        apart = (a.int() - b.int()).abs()
        assert apart.max() <= 1
        assert apart.sum() <= 1 + a.numel() / 1000


def test_a_block_with_what_is_not_finite_shows_it_and_others_do_not() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        ours, expected = build(PLAIN), build(PLAIN)
        for u in (ours.update, expected.update):
            u.gradient[1, 7] = value
        launch_adamw([ours.update], **OPTIONS)
        spelled_out(expected.update, 0, **OPTIONS)
        assert_same_memory(ours, expected)
        assert ours.update.exp_avg_scales is not None
        is_spoiled = ~ours.update.exp_avg_scales.isfinite()
        assert is_spoiled.nonzero().tolist() == [[1, 0]]


def test_blocks_of_zeros_stay_zeros_and_decay_goes_on() -> None:
    u = build(PLAIN).update
    u = dataclasses.replace(u, gradient=torch.zeros(u.weight.shape))
    assert u.exp_avg is not None and u.exp_avg_scales is not None and u.exp_avg_sq_scales is not None
    for t in (u.exp_avg, u.exp_avg_scales):
        t[0] = 0  # as they are before the first update
    before = u.exp_avg_sq.clone(), u.exp_avg_sq_scales.clone()
    for step in range(1, 11):
        launch_adamw([dataclasses.replace(u, step=step)], **OPTIONS)
    assert (u.exp_avg[0] == 127).all() and (u.exp_avg_scales[0] == torch.tensor(1e-12)).all()
    # of a block that shrinks as a whole codes stay, and the scale shrinks
    assert torch.equal(u.exp_avg_sq, before[0])
    torch.testing.assert_close(u.exp_avg_sq_scales, before[1] * 0.999**10, rtol=1e-5, atol=0)


def test_codes_and_scales_that_do_not_belong_together_are_refused() -> None:
    u = build(PLAIN).update
    scales = u.exp_avg_sq_scales
    assert scales is not None
    for change, message in (
        ({"exp_avg_sq_scales": None}, "the scales of exp_avg_sq are missing"),
        ({"exp_avg_sq_scales": scales[:, :1].contiguous()}, r"are \(5, 1\).*must be \(5, 2\)"),
        ({"exp_avg_sq_scales": scales.double()}, "float64"),
        ({"exp_avg": torch.zeros(u.weight.shape)}, "the moments are torch.float32 and torch.uint8"),
        (
            {"exp_avg": None, "exp_avg_scales": None, "exp_avg_sq": torch.zeros(u.weight.shape)},
            "exp_avg_sq has scales, which only moments in uint8 have",
        ),
    ):
        with pytest.raises(OptionError, match=message):
            launch_adamw([dataclasses.replace(u, **change)], **(OPTIONS | {"beta1": 0.0}))
