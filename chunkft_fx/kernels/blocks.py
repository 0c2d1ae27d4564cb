"""Computes 8-bit codes of float32 moments: neighbours share a scale, and a code stands for a place of a fixed map.

The format is that of torchao's 8-bit optimizers (Dettmers et al., arXiv 2110.02861), bit for bit: a *block* is divided
by its largest magnitude, and each value becomes the code of the nearest of 256 numbers from 0 or -1 to 1, which lie
close together near zero. Blocks here begin anew with each index of a parameter's cut dimension: they are
`graph.layout.BLOCK_NUMEL` neighbours, the last of an index what is left. A slice therefore holds whole blocks wherever
it is cut, so that nothing that is computed depends on cuts. Where an index has a multiple of 256 elements, and the
parameter is cut along dimension 0, blocks are torchao's.

The map of signed values has no -1. A block whose largest magnitude is of a negative value has it as code 0, which
stands for 0.993 of that magnitude: floats that were made of codes do not say by themselves what their scale was.
`from_floats` finds it.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chunkft_fx.graph.layout import BLOCK_NUMEL, blocks_of

CODES = 256
# The largest numbers of the map lie in [0.1, 1), the next ones in [0.01, 0.1), and so on.
DECADES = 7
# A block of zeros has this scale.
LEAST_SCALE = 1e-12
# Elements that are converted at once: bounds the temporary memory.
PIECE_NUMEL = 2**24

Floats = npt.NDArray[np.float32]


@functools.cache
def code_values(signed: bool) -> Floats:
    """What the codes stand for, float32[256] in ascending order: 0, 1, and the middles of equal parts of each decade.

    A decade has twice as many parts as the one below; of signed values each part is there with both signs.
    """
    single = np.float32
    values = [single(0), single(1)]
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        step = (single(1) - single(0.1)) / single(parts)
        at = np.arange(parts + 1, dtype=np.float64)
        # each border from the nearer end, rounded once
        borders = np.where(at < (parts + 1) // 2, np.float64(single(0.1)) + step * at, 1 - step * (parts - at))
        low, high = borders[:-1].astype(single), borders[1:].astype(single)
        found = single(10.0 ** (decade + 1 - DECADES)) * ((low + high) / single(2))
        values += [*found, *(-found if signed else ())]
    return np.sort(np.array(values, dtype=single))


@functools.cache
def code_borders(signed: bool) -> Floats:
    """The least float32 that is rounded to each code but the first, float32[255].

    A value goes to the upper one of two neighbours if its distance from the lower is half of theirs or more, each
    difference rounded to float32.
    """
    values = code_values(signed)
    low, high = values[:-1], values[1:]
    half = (high - low) * np.float32(0.5)
    border = low + half
    for _ in range(4):  # the last float32 that is too low, from a few above
        border = np.nextafter(border, np.float32(2))
    for _ in range(8):
        below = np.nextafter(border, np.float32(-2))
        border = np.where(below - low >= half, below, border)
    return border


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """float32[4, 256] on ``device``: values of signed codes, their borders, and both of unsigned ones.

    Behind the last border stands an infinity.
    """
    rows = []
    for signed in (True, False):
        rows += [code_values(signed), np.append(code_borders(signed), np.float32(np.inf))]
    return torch.from_numpy(np.stack(rows)).to(device)


def dequantised(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 values, in the shape of ``codes``: uint8[indices, ...]; ``scales`` are float32[indices, blocks]."""
    values = code_table(codes.device)[0 if signed else 2][codes.reshape(len(codes), -1).int()]
    factors = scales.repeat_interleave(BLOCK_NUMEL, dim=1)[:, : values.shape[1]]
    return values.mul_(factors).view(codes.shape)


def quantised(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes of float32[indices, ...], in its shape, and their scales: as an update stores its moments.

    In a block with a value that is not finite no value is afterwards.
    """
    blocks = _blocks(values)
    scales = blocks.abs().amax(-1).clip(LEAST_SCALE)
    return _codes(blocks, scales, signed, values), scales


def from_floats(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """As `quantised`, but values that `dequantised` made become their codes again, and stay what they are to the bit.

    Others, such as those of a float32 optimizer, are rounded.
    """
    rows = max(1, PIECE_NUMEL * len(values) // max(values.numel(), 1))
    made = [_from_floats(part, signed) for part in values.split(rows)]
    return torch.cat([codes for codes, _ in made]), torch.cat([scales for _, scales in made])


def _from_floats(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, scales = quantised(values, signed)
    if not signed:
        return codes, scales
    blocks = _blocks(values)
    known = _reproduces(codes, scales, blocks)
    # the scales of which code 0 stands for the lowest value: no other than the quotient's neighbours
    quotient = blocks.amin(-1) / float(code_values(True)[0])
    for toward in (None, -torch.inf, torch.inf):
        tried = quotient if toward is None else quotient.nextafter(torch.full_like(quotient, toward))
        other = _codes(blocks, tried.clip(LEAST_SCALE), signed, values)
        is_better = ~known & (tried >= LEAST_SCALE) & _reproduces(other, tried, blocks)
        known |= is_better
        scales = torch.where(is_better, tried, scales)
    return _codes(blocks, scales, signed, values), scales


def _reproduces(codes: Tensor, scales: Tensor, blocks: Tensor) -> Tensor:
    """Of which blocks of signed values these codes and scales are the very values; bool[indices, blocks]."""
    return (_blocks(dequantised(codes, scales, signed=True)) == blocks).all(-1)


def _blocks(values: Tensor) -> Tensor:
    """The blocks of values [indices, ...], filled up with zeros: [indices, blocks, 256]."""
    rows = values.reshape(len(values), -1)
    missing = blocks_of(rows.shape[1]) * BLOCK_NUMEL - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)).view(len(rows), -1, BLOCK_NUMEL)


def _codes(blocks: Tensor, scales: Tensor, signed: bool, like: Tensor) -> Tensor:
    """The nearest codes under these scales, in the shape of the values that the blocks were made of."""
    borders = code_table(blocks.device)[1 if signed else 3, : CODES - 1]
    found = torch.bucketize(blocks / scales[..., None], borders, right=True)
    return found.view(len(like), -1)[:, : like[0].numel()].to(torch.uint8).view(like.shape)
