"""Holds what a chunk is: data that plans, demands, gradients and optimizers are written in."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """``parameter.narrow(dim, start, length)``: the unit of gradient, update and streaming.

    ``size`` is the parameter's whole size along ``dim`` (1 for a scalar parameter, whose ``dim`` is 0).
    """

    name: str
    dim: int
    start: int
    length: int
    size: int

    @property
    def is_whole(self) -> bool:
        """True when the slice is the whole parameter."""
        return self.length == self.size


@dataclass(frozen=True)
class Chunk:
    """The slices that are active together; ``numel`` elements, ``nbytes`` of weights and optimizer state."""

    slices: tuple[Slice, ...]
    numel: int
    nbytes: int

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.slices, self.nbytes))

    def __hash__(self) -> int:
        """Found once: chunks stand in keys that are looked up thousands of times."""
        return self._hash
