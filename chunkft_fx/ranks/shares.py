"""Decides which indices of each parameter's cut dimension belong to which rank, whose optimizer states it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkft_fx.plan.chunk import Chunk, Slice


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
