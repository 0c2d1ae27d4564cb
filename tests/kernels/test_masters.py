"""Masters as a bfloat16 weight and 16 more bits: each float32 comes back, updates equal those of float32 masters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.adamw.fused import adamw
from chunkft_fx.kernels.adamw.reference import SliceUpdate
from chunkft_fx.kernels.masters import join_master, split_master, ties
from tests.kernels.operands import Spec, build

PLAIN = Spec((9, 40), (0, 1), 0, 2, 5, torch.bfloat16, torch.float32, "front", 0, 3, 0, is_remainder=True)
OPTIONS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# Upper halves of float32: zeros, the least numbers, ordinary ones, the largest, infinities and NaN, of both signs.
UPPER = (0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x4049, 0x7F7E, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF)


def floats(bits: npt.ArrayLike) -> Tensor:
    """float32 of these bits."""
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.int32)).view(torch.float32)


def bits_of(t: Tensor) -> npt.NDArray[np.int64]:
    kinds: dict[torch.dtype, Any] = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.int16: np.int16}
    plain = t.view(torch.int32 if t.dtype == torch.float32 else torch.int16).contiguous()
    return plain.numpy().view(kinds[t.dtype]).astype(np.int64)


def check(bits: npt.NDArray[np.int64]) -> None:
    """What the two halves of these float32 are, and that they make them again."""
    weight, remainder = split_master(floats(bits))
    again = join_master(weight, remainder)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    assert (bits_of(again) == bits)[~is_nan].all()
    assert (bits_of(weight) == (bits + 0x8000) >> 16)[~is_nan].all()
    assert (bits_of(remainder) == bits - (bits_of(weight) << 16))[~is_nan].all()
    assert (weight.isnan().numpy() == is_nan).all()
    assert (again.isnan().numpy() == is_nan).all()
    nearest = bits_of(floats(bits).bfloat16())
    is_tie = (bits & 0x1FFFF) == 0x8000
    assert ((bits_of(weight) != nearest) == is_tie)[~is_nan].all()
    assert (np.flatnonzero(is_tie) == ties(floats(bits)).indices[0].numpy()).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_every_float32_comes_back(drawn: list[int]) -> None:
    check(np.array(drawn))


@pytest.mark.parametrize("upper", [sign | upper for upper in UPPER for sign in (0, 0x8000)])
def test_every_lower_half_comes_back(upper: int) -> None:
    check((upper << 16) + np.arange(2**16))


def test_the_largest_master_survives_its_infinite_weight() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])
    weight, remainder = split_master(largest)
    assert weight.isinf().all()
    assert torch.equal(join_master(weight, remainder), largest)


@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=200))
def test_a_changed_weight_is_within_half_a_unit_of_its_master(drawn: list[tuple[int, int]]) -> None:
    upper, remainder = np.array(drawn).T
    weight = torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    master = join_master(weight, torch.from_numpy(remainder.astype(np.int16)))
    assert torch.equal(master.isnan(), weight.isnan())
    off = bits_of(master) - (upper << 16)
    assert (abs(off) <= 0x8000).all()
    assert (bits_of(master) >> 31 == upper >> 15).all()
    magnitude = upper & 0x7FFF
    is_beyond = ((magnitude == 0) & (remainder < 0)) | ((magnitude == 0x7F80) & (remainder > 0)) | (magnitude > 0x7F80)
    assert (off == np.where(is_beyond, 0, remainder)).all()


def test_a_weight_set_to_zero_or_infinity_keeps_its_sign_and_is_a_number_with_any_remainder() -> None:
    remainder = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for value in (0.0, -0.0, float("inf"), -float("inf"), float("nan")):
        master = join_master(torch.full_like(remainder, value, dtype=torch.bfloat16), remainder)
        assert bool(master.isnan().any()) == (value != value)
        assert (master.signbit() == torch.tensor(value).signbit()).all()


@st.composite
def rounds(draw: st.DrawFn) -> dict[str, Any]:
    """Slices of a few lengths with step counts of their own, and the options of an optimizer."""
    return {
        "counts": draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2000)), min_size=2, max_size=2)),
        "state_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "beta1": draw(st.sampled_from([0.0, 0.9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "lr": draw(st.sampled_from([1e-4, 3e-2])),
        "scale": draw(st.sampled_from([None, 0.37])),
        "gradient_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=4)
@given(drawn=rounds())
def test_a_thousand_updates_equal_those_of_float32_masters_to_the_bit(drawn: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(drawn["seed"])
    lengths, state_dtype = [length for length, _ in drawn["counts"]], drawn["state_dtype"]
    first = [torch.randn(n, 3, generator=generator).bfloat16() for n in lengths]
    known = [w.float() for w in first], [torch.zeros(w.shape, dtype=torch.int16) for w in first]
    sides = [
        [
            (w.clone(), master, *torch.zeros(2, *w.shape, dtype=state_dtype))
            for w, master in zip(first, kept, strict=True)
        ]
        for kept in known
    ]
    scale = None if drawn["scale"] is None else torch.tensor(drawn["scale"])
    options = {key: drawn[key] for key in ("lr", "beta1", "weight_decay")} | {"beta2": 0.99, "eps": 1e-8}
    for step in range(1000):
        gradients = [torch.randn(w.shape, generator=generator).to(drawn["gradient_dtype"]) for w in first]
        for side in sides:
            updates = [
                SliceUpdate(w, g, m, average, square, count + step + 1)
                for (w, m, average, square), g, (_, count) in zip(side, gradients, drawn["counts"], strict=True)
            ]
            adamw(updates, **options, scale=scale, seed=step)
    for (w, master, *moments), (v, remainder, *others) in zip(*sides, strict=True):
        assert torch.equal(join_master(v, remainder).view(torch.int32), master.view(torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(moments, others, strict=True))
        assert torch.equal(w, master.bfloat16())
        assert torch.equal(v, split_master(master)[0])
        assert not torch.equal(master, master.bfloat16().float())


@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_gradient_of_the_weights_dtype_counts_as_its_float32(seed: int, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(PLAIN, weight_dtype=dtype, is_remainder=False, gradient_dtype=dtype, seed=seed)
    narrow, wide = build(spec).update, build(spec).update
    wide = dataclasses.replace(wide, gradient=wide.gradient.float())
    for u in (narrow, wide):
        adamw([u], **OPTIONS, scale=torch.tensor(0.3))
    assert narrow.master is not None and wide.master is not None
    assert torch.equal(narrow.master, wide.master)
    assert torch.equal(narrow.weight, wide.weight)


def test_operands_that_do_not_belong_together_are_refused() -> None:
    u = build(PLAIN).update
    half: dict[str, Any] = {"weight": u.weight.half(), "gradient": u.gradient}
    narrow: dict[str, Any] = {"weight": u.weight, "gradient": u.gradient.half()}
    for change, message in ((half, "the master is torch.int16"), (narrow, "float32 or torch.bfloat16")):
        with pytest.raises(OptionError, match=message):
            adamw([dataclasses.replace(u, **change)], **OPTIONS)
    without = dataclasses.replace(u, exp_avg=None)
    with pytest.raises(OptionError, match="only beta1=0 needs none"):
        adamw([without], **OPTIONS)
    adamw([without], **(OPTIONS | {"beta1": 0.0}))
