"""Computes float32 masters of low-precision weights: what a changed weight does to one, and the two formats of it.

A master may be kept as a float32, of which the weight is the nearest value (ties go to even), or, of a bfloat16 weight,
as a 16-bit *remainder*: the master's bits less those of the weight. The weight is then the master rounded half up in
magnitude, since 65,537 float32 values round to an even bfloat16 where ties go to even, and 65,536 where they go up.
The two formats therefore differ in their weights at exact ties alone, one float32 value in 131,072, and in no master.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements compared at once when a master is checked against its weight: bounds the temporary memory.
PIECE_NUMEL = 2**24
# float32 bits
INFINITY = 0x7F800000
NOT_A_NUMBER = 0x7FC00000
HALF_UNIT = 0x8000  # of a bfloat16, in units of float32


def reconcile(master: Tensor, weight: Tensor) -> None:
    """Make each weight that is not its master rounded, being new or changed from outside, the master.

    Both have the same shape, of one dimension or more; ``master`` is written in place, where it is.
    """
    indices = max(1, PIECE_NUMEL * len(weight) // weight.numel())
    for start in range(0, len(weight), indices):
        m, w = master[start : start + indices], weight[start : start + indices].to(master.device)
        torch.where(m.to(w.dtype) == w, m, w.to(m.dtype), out=m)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 weight of a float32 master, and its remainder in int16; `join_master` is the inverse.

    A finite master keeps every bit, also near the largest float32, where the weight is infinite as it is for any
    rounding. Every NaN is stored as one and the same.
    """
    bits = torch.where(master.isnan(), NOT_A_NUMBER, master.view(torch.int32))
    weight = (bits + HALF_UNIT) >> 16
    return weight.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight with this remainder, int16 of its shape.

    If the weight was changed from outside that is the new weight with the old remainder: it is off by half a unit of
    the weight at most. Where the remainder would lead beyond zero or infinity, and for NaN, it is the weight itself.
    """
    bits = weight.view(torch.int16).to(torch.int32)
    magnitude = (bits & 0x7FFF) << 16
    moved = magnitude + remainder
    moved = torch.where((moved >= 0) & (moved <= INFINITY), moved, magnitude)
    return (moved | (bits & -0x8000) << 16).view(torch.float32)


@dataclass(frozen=True)
class Ties:
    """Elements of one parameter, of bfloat16, at which the weights of the two formats differ, with their masters.

    ``indices`` are those of the parameter, or of one element if it has no dimension.
    """

    indices: tuple[Tensor, ...]
    masters: Tensor

    def settle(self, weight: Tensor, is_remainder: bool) -> None:
        """Give the elements that have the other format's weight that of this one; all others stay as they are."""
        down, (up, _) = self.masters.bfloat16(), split_master(self.masters)
        wanted, other = (up, down) if is_remainder else (down, up)
        home = torch.atleast_1d(weight.detach())
        found = home[self.indices]
        is_other = found == other.to(found.device)
        if is_other.any():
            home[self.indices] = torch.where(is_other, wanted.to(found.device), found)


def ties(master: Tensor) -> Ties:
    """The elements of these float32 masters that lie halfway between an even bfloat16 and the next one up."""
    found = torch.atleast_1d(master)
    indices = ((found.view(torch.int32) & 0x1FFFF) == HALF_UNIT).nonzero(as_tuple=True)
    return Ties(indices, found[indices])
