"""The 8-bit format written out once more, slowly and without the library's code, as an oracle for it."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]


def written_out_map(signed: bool) -> Floats:
    """The 256 numbers: each decade below 1 in equal parts, of which the middles count; 0 and 1 beside."""
    found = [0.0, 1.0]
    for exponent in range(-6, 1):
        parts = 2 ** (6 + exponent) * (1 if signed else 2)
        borders = torch.linspace(0.1, 1, parts + 1).tolist()
        for a, b in itertools.pairwise(borders):
            middle = np.float32(a + b) / np.float32(2)
            number = float(np.float32(10.0**exponent) * middle)
            found += [number, -number] if signed else [number]
    return np.array(sorted(found), dtype=np.float32)


def codes_of(shares: Floats, numbers: Floats) -> npt.NDArray[np.uint8]:
    """The codes of values of a block that were divided by its largest magnitude; what is no number lies above all."""
    low = np.searchsorted(numbers, shares, side="right").clip(1) - 1
    up = (low + 1).clip(max=255)
    goes_up = shares - numbers[low] >= (numbers[up] - numbers[low]) * np.float32(0.5)
    return np.where(np.isnan(shares), 255, np.where(goes_up, up, low)).astype(np.uint8)


def blocks_of_row(row: int) -> list[slice]:
    return [slice(start, min(start + 256, row)) for start in range(0, row, 256)]


def quantised_slowly(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes in the shape of float32[indices, ...], and scales float32[indices, blocks]."""
    numbers = written_out_map(signed)
    rows = values.reshape(len(values), -1).numpy()
    codes, scales = np.zeros(rows.shape, np.uint8), []
    for row, into in zip(rows, codes, strict=True):
        for block in blocks_of_row(len(row)):
            scale = np.maximum(np.abs(row[block]).max(), np.float32(1e-12))
            scales.append(scale)
            with np.errstate(invalid="ignore"):
                into[block] = codes_of(row[block] / scale, numbers)
    return torch.from_numpy(codes).view(values.shape), torch.tensor(np.array(scales)).view(len(values), -1)


def dequantised_slowly(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    numbers = written_out_map(signed)
    rows = numbers[codes.reshape(len(codes), -1).numpy()]
    for row, factors in zip(rows, scales.numpy(), strict=True):
        for block, factor in zip(blocks_of_row(len(row)), factors, strict=True):
            row[block] *= factor
    return torch.from_numpy(rows).view(codes.shape)
