"""8-bit codes: the map and its rounding, the way back from floats, and torchao's numbers where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.kernels.blocks import code_borders, code_values, dequantised, from_floats, quantised
from tests.kernels.block_format import codes_of, dequantised_slowly, quantised_slowly, written_out_map


@st.composite
def moments(draw: st.DrawFn) -> tuple[Tensor, bool]:
    """Moments [indices, row], signed or not, over many magnitudes, with zeros, whole blocks of them among others."""
    signed = draw(st.booleans())
    shape = draw(st.integers(1, 4)), draw(st.sampled_from([1, 64, 255, 256, 257, 600]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-14, 6))
    values *= 10.0 ** (-draw(st.integers(0, 8)) * torch.rand(shape, generator=generator))
    values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = 0
    if draw(st.booleans()):
        values[0] = 0
    if draw(st.booleans()):  # the largest magnitude is below zero in each block
        values = -values.abs() if draw(st.booleans()) else torch.where(values == values.amax(), -values, values)
    return (values if signed else values.square()), signed


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_and_its_borders_are_those_written_out(signed: bool) -> None:
    numbers = written_out_map(signed)
    assert (numbers == code_values(signed)).all()
    assert (np.diff(numbers) > 0).all()
    assert (numbers[[0, -1]] == [np.float32(-0.99296874) if signed else 0, 1]).all()
    borders = code_borders(signed)
    assert (codes_of(borders, numbers) == np.arange(1, 256)).all()
    assert (codes_of(np.nextafter(borders, np.float32(-2)), numbers) == np.arange(255)).all()


@settings(max_examples=60)
@given(moments())
def test_codes_and_values_are_those_of_the_slow_way(drawn: tuple[Tensor, bool]) -> None:
    values, signed = drawn
    codes, scales = quantised(values, signed)
    slow_codes, slow_scales = quantised_slowly(values, signed)
    assert torch.equal(codes, slow_codes) and torch.equal(scales, slow_scales)
    assert torch.equal(dequantised(codes, scales, signed), dequantised_slowly(codes, scales, signed))


@settings(max_examples=60)
@given(moments())
def test_no_code_is_nearer_to_a_value(drawn: tuple[Tensor, bool]) -> None:
    values, signed = drawn
    codes, scales = quantised(values, signed)
    each = scales.repeat_interleave(256, dim=1)[:, : values.shape[1]].double()
    assert (values.double().abs() <= each).all()
    shares, numbers = values.double() / each, torch.from_numpy(code_values(signed)).double()
    distances = (shares[..., None] - numbers).abs()
    chosen = distances.gather(-1, codes.long()[..., None])[..., 0]
    # a share is rounded to float32 before it is compared
    assert (chosen <= distances.amin(-1) + 2**-22 * shares.abs()).all()


@settings(max_examples=100)
@given(moments())
def test_values_made_of_codes_become_the_same_codes_and_values(drawn: tuple[Tensor, bool]) -> None:
    values, signed = drawn
    codes, scales = quantised(values, signed)
    made = dequantised(codes, scales, signed)
    again, found = from_floats(made, signed)
    assert torch.equal(again, codes)
    assert torch.equal(dequantised(again, found, signed), made)
    # Two neighbouring scales can stand for the same values, where few of them are not zero.
    assert ((found.view(torch.int32) - scales.view(torch.int32)).abs() <= 1).all()


@given(moments())
def test_other_floats_are_rounded_as_an_update_rounds_them(drawn: tuple[Tensor, bool]) -> None:
    values, signed = drawn
    codes, scales = from_floats(values, signed)
    rounded, largest = quantised(values, signed)
    made = dequantised(codes, scales, signed)
    for block, start in enumerate(range(0, values.shape[1], 256)):
        at = slice(start, start + 256)
        keeps = (made[:, at] == values[:, at]).all(-1)
        assert ((codes[:, at] == rounded[:, at]).all(-1) | keeps).all()
        assert ((scales[:, block] == largest[:, block]) | keeps).all()


def test_what_no_update_has_touched_stays_zero() -> None:
    codes, scales = torch.zeros(3, 300, dtype=torch.uint8), torch.zeros(3, 2)
    for signed in (True, False):
        made = dequantised(codes, scales, signed)
        assert not made.any()
        assert not dequantised(*from_floats(made, signed), signed).any()


def test_long_tensors_are_converted_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(9, 70, 5, generator=torch.Generator().manual_seed(0))
    whole = from_floats(values, True)
    monkeypatch.setattr("chunkft_fx.kernels.blocks.PIECE_NUMEL", 800)
    assert all(torch.equal(a, b) for a, b in zip(whole, from_floats(values, True), strict=True))
    assert whole[0].shape == values.shape and whole[1].shape == (9, 2)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_scales_and_values_are_those_of_torchao(signed: bool) -> None:
    theirs: Any = pytest.importorskip("torchao.optim.quant_utils")
    numbers = torch.tensor(theirs.create_dynamic_map(signed))
    assert torch.equal(numbers, torch.from_numpy(code_values(signed)))
    values = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 2048)[:, None]
    values = values if signed else values.square()
    shares, scales = theirs.scale_tensor(values, 256)
    codes = theirs.quantize_8bit_with_qmap(shares, numbers)
    ours = quantised(values, signed)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1].view(-1), scales)
    assert torch.equal(dequantised(*ours, signed), theirs.dequant_with_qmap(codes, numbers, scales))
