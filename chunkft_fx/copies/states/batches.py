"""Batches of the stage: decides where states lie on it, which bytes are copied together, and which copies conflict.

States lie on the stage in the order in which they lie in host memory, so that neighbours move in one copy. The copies
are cut into batches of equal size: what comes in follows what goes out a batch behind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkft_fx.graph.layout import stage_nbytes

# Bytes after which the other direction may follow: 1.3 ms of copying, so that neither waits long for the first.
BATCH_NBYTES = 64 * 2**20


@dataclass(frozen=True)
class Copy:
    """Bytes that are contiguous on both sides: ``uint8[nbytes]`` views, and where the host's begin."""

    staged: Tensor
    host: Tensor
    address: int


@dataclass(frozen=True)
class Batch:
    """Copies that share one mark: neighbours on the stage, in ascending order there and in host memory.

    Together they use the bytes from ``start`` to ``end`` of the stage.
    """

    start: int
    end: int
    copies: tuple[Copy, ...]

    @property
    def staged(self) -> list[Tensor]:
        """The stage's side of each copy."""
        return [copy.staged for copy in self.copies]

    @property
    def host(self) -> list[Tensor]:
        """The host's side of each copy."""
        return [copy.host for copy in self.copies]


def stage_places(host: Sequence[Tensor]) -> tuple[list[int], int]:
    """Each tensor's offset on the stage, in the order of host memory, and the bytes of all."""
    places = [0] * len(host)
    end = 0
    for i in sorted(range(len(host)), key=lambda i: host[i].data_ptr()):
        places[i] = end
        end += stage_nbytes(host[i].nbytes)
    return places, end


def carved(arena: Tensor, host: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Tensors like those of the host at their places on the stage."""
    return [arena[start : start + t.nbytes].view(t.dtype).view(t.shape) for t, start in zip(host, places, strict=True)]


def batches_of(arena: Tensor, host: Sequence[Tensor], places: Sequence[int]) -> list[Batch]:
    """The copies between host and stage: neighbours on both sides as one, cut into batches."""
    runs: list[tuple[int, int, Tensor]] = []  # where it begins on the stage, its bytes, its first tensor
    for start, t in sorted(zip(places, host, strict=True), key=lambda entry: entry[0]):
        if not t.nbytes:
            continue
        if runs:
            begin, nbytes, first = runs[-1]
            is_next = begin + nbytes == start and first.data_ptr() + nbytes == t.data_ptr()
            if is_next and first.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                runs[-1] = (begin, nbytes + t.nbytes, first)
                continue
        runs.append((start, t.nbytes, t))
    batches: list[Batch] = []
    copies: list[Copy] = []
    filled = 0
    for begin, nbytes, first in runs:
        source = _bytes_from(first, nbytes)
        at = 0
        while at < nbytes:
            size = min(nbytes - at, BATCH_NBYTES - filled)
            staged = arena[begin + at : begin + at + size]
            copies.append(Copy(staged, source[at : at + size], first.data_ptr() + at))
            at, filled = at + size, filled + size
            if filled == BATCH_NBYTES:
                batches.append(_batch(arena, copies))
                copies, filled = [], 0
    if copies:
        batches.append(_batch(arena, copies))
    return batches


def _batch(arena: Tensor, copies: Sequence[Copy]) -> Batch:
    base, last = arena.data_ptr(), copies[-1].staged
    return Batch(copies[0].staged.data_ptr() - base, last.data_ptr() - base + last.nbytes, tuple(copies))


def _bytes_from(first: Tensor, nbytes: int) -> Tensor:
    """``nbytes`` bytes of host memory from the beginning of a tensor on, also past its end."""
    offset = first.storage_offset() * first.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage(), offset, (nbytes,), (1,))


def last_conflict(written: Sequence[Batch], batch: Batch) -> int:
    """The last of the written batches that reads stage memory, or writes host memory, which ``batch`` is to use.

    -1 when there is none. All batches are in ascending order, on the stage as in host memory.
    """
    last = bisect_left(written, batch.end, key=lambda w: w.start) - 1
    if last >= 0 and written[last].end <= batch.start:
        last = -1
    for copy in batch.copies:
        found = bisect_left(written, copy.address + copy.host.nbytes, key=lambda w: w.copies[0].address) - 1
        if found > last and any(
            w.address < copy.address + copy.host.nbytes and copy.address < w.address + w.host.nbytes
            for w in written[found].copies
        ):
            last = found
    return last
