"""Holds what a chunk is, and a rank's share of one: data that plans, demands and optimizers are written in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace


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


@dataclass(frozen=True)
class Share:
    """What the rank of number ``rank`` among ``ranks`` has: an equal run of the indices of every parameter.

    It depends on the size of the parameter alone, so that another plan, or cut, moves no states between ranks.
    """

    rank: int = 0
    ranks: int = 1

    @property
    def is_all(self) -> bool:
        """Whether this is everything."""
        return self.ranks == 1

    def of(self, size: int) -> tuple[int, int]:
        """The first index, and the number of indices, of a dimension of ``size``."""
        start = size * self.rank // self.ranks
        return start, size * (self.rank + 1) // self.ranks - start

    def within(self, s: Slice) -> Slice | None:
        """The part of a slice that belongs to this share; None if it has no index of it."""
        if self.is_all:
            return s
        first, length = self.of(s.size)
        start, end = max(first, s.start), min(first + length, s.start + s.length)
        return None if end <= start else replace(s, start=start, length=end - start)

    def chunk(self, chunk: Chunk) -> Chunk:
        """The part of a chunk that belongs to this share; its numbers of elements and bytes in proportion."""
        if self.is_all:
            return chunk
        own = tuple(s for s in map(self.within, chunk.slices) if s is not None)
        return Chunk(own, chunk.numel // self.ranks, chunk.nbytes // self.ranks)

    @property
    def each(self) -> Sequence[Share]:
        """The shares of all ranks, by rank."""
        return [Share(rank, self.ranks) for rank in range(self.ranks)]


# What a rank by itself has.
ALL = Share()
