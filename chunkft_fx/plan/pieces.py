"""Decides the pieces of full coverage: the parts of the parameters whose states pass through the device in turn.

A step that covers all parameters cannot have all their states on the device. They come piece by piece, through a ring
of buffers: one is updated while the next comes in and the one before goes out. A piece lies within one region, so that
its gradients are complete as soon as the backward has left that region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import overload

from torch import Tensor

from chunkft_fx.graph.layout import stage_nbytes, wide_dtype
from chunkft_fx.plan.chunk import ALL, Chunk, Share
from chunkft_fx.plan.cuts import ParameterSpec, Stream, cut
from chunkft_fx.plan.state_spec import StateSpec, stage_capacity_nbytes

# The fewest buffers of a ring that keep both ways of the link busy.
DEPTH = 3
# More buffers even out how long pieces take, and bring states in while the forward runs, when the link would rest.
MOST_BUFFERS = 24
# Numbers of buffers that are tried at least, and filled up from there: room for more of them takes saved values.
DEPTHS = (DEPTH, 8, MOST_BUFFERS)
# A piece of this size moves in 5 ms each way: long beside the start of a copy, short beside a region's backward.
LARGEST_NBYTES = 256 * 2**20
# Of a small model every piece is so small a part, that the ring stays small beside the states of the whole.
LEAST_PIECES = 32


@dataclass(frozen=True)
class Pieces(Sequence[Chunk]):
    """The pieces in the order of the parameters, whose states pass through a ring of ``depth`` buffers."""

    chunks: tuple[Chunk, ...] = ()
    depth: int = DEPTH

    def deepened(self, free_nbytes: int, buffer_nbytes: int) -> Pieces:
        """The same pieces with as many buffers more, of ``buffer_nbytes`` each, as ``free_nbytes`` have room for."""
        most = max(min(MOST_BUFFERS, len(self.chunks)), self.depth)
        return replace(self, depth=min(self.depth + free_nbytes // max(buffer_nbytes, 1), most))

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Chunk, ...]: ...

    def __getitem__(self, index: int | slice) -> Chunk | tuple[Chunk, ...]:
        return self.chunks[index]

    def __len__(self) -> int:
        return len(self.chunks)


def cut_pieces(parameters: Sequence[ParameterSpec]) -> Pieces:
    """The parameters in pieces of nearly equal bytes (weights and states), each within one region, in their order."""
    limit = min(LARGEST_NBYTES, max(Stream(parameters).nbytes // LEAST_PIECES, 1))
    pieces: list[Chunk] = []
    for _, region in groupby(parameters, key=lambda p: p.region):
        own = tuple(region)
        stream = Stream(own) if any(_has_elements(p) for p in own) else None
        if stream is not None:
            pieces += cut(own, min(-(-stream.nbytes // limit), stream.pieces))
    return Pieces(tuple(pieces))


def piece_nbytes(
    pieces: Sequence[Chunk],
    parameters: Mapping[str, Tensor],
    spec: StateSpec,
    streamed: frozenset[str],
    share: Share = ALL,
) -> int:
    """Bytes of a buffer of the ring: those of the largest piece's states, and of its weights that are ``streamed``.

    Of several ranks each has those of its ``share``, and a buffer holds the largest of these. Where the backward
    updates, gradients that only accumulate pass through the same buffers, whole.
    """
    shared = [each.chunk(p) for each in share.each for p in pieces]
    states = max(stage_capacity_nbytes(p, parameters, spec) + _weights(p, parameters, streamed) for p in shared)
    return max(states, waiting_nbytes(pieces, parameters)) if spec.in_backward else states


def weights_nbytes(piece: Chunk, parameters: Mapping[str, Tensor], among: frozenset[str] | None = None) -> int:
    """Bytes of a piece's weights, of those ``among`` these parameters if they are given."""
    found = [(s, parameters[s.name]) for s in piece.slices if among is None or s.name in among]
    return sum(p.nbytes // s.size * s.length for s, p in found)


def moving_nbytes(piece: Chunk, parameters: Mapping[str, Tensor], streamed: frozenset[str], ranks: int = 1) -> int:
    """Bytes that come for a piece's update and leave behind it: its states, and its weights that are ``streamed``.

    Each of several ranks moves its share of the states.
    """
    states = (piece.nbytes - weights_nbytes(piece, parameters)) // ranks
    return states + weights_nbytes(piece, parameters, streamed)


def waiting_nbytes(pieces: Sequence[Chunk], parameters: Mapping[str, Tensor]) -> int:
    """Bytes of a buffer that gradients pass through on their way to host memory and back: the largest piece's."""
    widths = {name: wide_dtype(p.dtype).itemsize for name, p in parameters.items()}
    sizes = {name: p.numel() for name, p in parameters.items()}
    return max(sum(stage_nbytes(sizes[s.name] // s.size * s.length * widths[s.name]) for s in p.slices) for p in pieces)


def _weights(piece: Chunk, parameters: Mapping[str, Tensor], streamed: frozenset[str]) -> int:
    away = [(s, parameters[s.name]) for s in piece.slices if s.name in streamed]
    return sum(stage_nbytes(p.numel() // s.size * s.length * p.itemsize) for s, p in away)


def _has_elements(parameter: ParameterSpec) -> bool:
    return all(parameter.shape)
