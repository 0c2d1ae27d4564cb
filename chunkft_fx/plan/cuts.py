"""Decides where the trainable parameters are cut into chunks of nearly equal bytes.

All parameters, in the order given, form one stream of bytes (weights and optimizer state). Boundary
``k`` of ``n`` aims at ``k/n`` of it and then snaps, to keep the number of distinct region variants small
(each is compiled once) and inner cuts efficient as matrix products. The first of these that lies close
enough, after the boundary before it, is taken (distances in shares of a mean chunk's bytes):

1. the nearest border between two regions, within 1/8: regions are then wholly active or inactive;
2. the nearest border between two tensors, within 1/16: variants differ by whole tensors only;
3. inside a tensor a multiple of 1/8 of its cut dimension, if aligned, within 1/16: chunks that cut
   equal tensors then cut them at the same places and share their variants;
4. the nearest aligned index, within 1/2: matrix products keep tiles that divide;
5. the nearest index.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from chunkft_fx.errors import ChunkCountError
from chunkft_fx.plan.chunk import Chunk, Slice

# A first dimension below this many indices makes thin slices; another, larger dimension is cut instead.
MIN_CUT_SIZE = 64
# Tiles of GPU matrix products are 64 or a multiple; a dimension of a few tiles is worth keeping aligned.
TILE = 64
MIN_ALIGNED_SIZE = 4 * TILE

REGION_TOLERANCE = 8
TENSOR_TOLERANCE = 16
FRACTIONS = 8
FRACTION_TOLERANCE = 16
ALIGNED_TOLERANCE = 2


@dataclass(frozen=True)
class ParameterSpec:
    """One trainable parameter as the stream sees it.

    ``nbytes_per_element`` counts the weight and its optimizer state (bf16: 2 + 12; float32, its own
    master: 4 + 8), ``nbytes_per_index`` what an index of the cut dimension takes beside (scales of 8-bit moments);
    ``region`` labels the part of the model that it belongs to. A parameter that ``is_whole`` is never cut.
    """

    name: str
    shape: tuple[int, ...]
    nbytes_per_element: int
    region: int
    is_whole: bool = False
    nbytes_per_index: int = 0


def cut_dim(shape: Sequence[int]) -> int:
    """The one dimension along which a parameter of this shape is ever sliced, whatever the plan.

    Dimension 0, unless it is small (below 64) and another is larger: then the first of the largest.
    Convolution weights (four dimensions or more) keep to output channels unless there is only one.
    """
    if not shape:
        return 0
    small = shape[0] == 1 if len(shape) >= 4 else shape[0] < MIN_CUT_SIZE
    return list(shape).index(max(shape)) if small else 0


def alignment(shape: Sequence[int], dim: int) -> int:
    """The multiple at which inner cuts along ``dim`` should fall: 64 from 256 indices on, else 1."""
    return TILE if shape and shape[dim] >= MIN_ALIGNED_SIZE else 1


def max_chunks(parameters: Sequence[ParameterSpec]) -> int:
    """The number of indices that can be told apart: the most chunks these parameters can be cut into."""
    return sum(t.size for t in _tensors(parameters))


def cut(parameters: Sequence[ParameterSpec], chunks: int) -> tuple[Chunk, ...]:
    """Cut the parameters into ``chunks`` non-empty chunks; see the module docstring for the rule.

    Together the slices hold each element exactly once, at most one slice per parameter and chunk.
    Parameters without elements have no slice. Raises `ChunkCountError` unless ``chunks`` is an int
    from 1 to ``max_chunks(parameters)``.
    """
    stream = Stream(parameters)
    tensors, pieces = stream.tensors, stream.pieces
    if isinstance(chunks, bool) or not isinstance(chunks, int):
        raise ChunkCountError(f"chunks={chunks!r} is not a whole number; give an int from 1 to {pieces}")
    if chunks < 1:
        raise ChunkCountError(f"chunks={chunks} is below 1; give an int from 1 to {pieces}")
    if chunks > pieces:
        raise ChunkCountError(
            f"chunks={chunks} is more than the {pieces} indices that the {len(tensors)} trainable parameters "
            f"can be cut into; give at most {pieces}"
        )
    boundaries = [0]
    for k in range(1, chunks):
        boundaries.append(stream.boundary(k, chunks, boundaries[-1] + 1, pieces - (chunks - k)))
    boundaries.append(pieces)
    return tuple(stream.chunk(a, b) for a, b in pairwise(boundaries))


@dataclass(frozen=True)
class _Tensor:
    """A parameter in the stream: ``size`` pieces of ``piece_numel`` and ``piece_nbytes`` along its cut dimension.

    A *piece* is so many indices of one tensor as stay together: one, or all. ``first_piece`` and ``first_byte`` say
    where the tensor begins.
    """

    spec: ParameterSpec
    dim: int
    size: int
    indices: int
    piece_numel: int
    piece_nbytes: int
    first_piece: int
    first_byte: int


def _tensors(parameters: Sequence[ParameterSpec]) -> list[_Tensor]:
    tensors: list[_Tensor] = []
    piece = byte = 0
    for spec in parameters:
        numel = prod(spec.shape)
        if numel == 0:
            continue
        dim = cut_dim(spec.shape)
        length = spec.shape[dim] if spec.shape else 1
        size, indices = (1, length) if spec.is_whole else (length, 1)
        piece_nbytes = numel // size * spec.nbytes_per_element + indices * spec.nbytes_per_index
        tensors.append(_Tensor(spec, dim, size, indices, numel // size, piece_nbytes, piece, byte))
        piece, byte = piece + size, byte + size * piece_nbytes
    return tensors


class Stream:
    """The byte stream of the tensors: candidates for boundaries, and the chunks between them."""

    def __init__(self, parameters: Sequence[ParameterSpec]) -> None:
        self.tensors = tensors = _tensors(parameters)
        self.pieces = sum(t.size for t in tensors)
        last = tensors[-1]
        self.nbytes = last.first_byte + last.size * last.piece_nbytes
        self._bytes = [t.first_byte for t in tensors]
        self._first_pieces = [t.first_piece for t in tensors]
        self._whole = [_slice(t, 0, t.size) for t in tensors]
        self._tensor_borders = list(tensors[1:])
        self._region_borders = [b for a, b in pairwise(tensors) if a.spec.region != b.spec.region]

    def boundary(self, k: int, chunks: int, lowest: int, highest: int) -> int:
        """The piece at which boundary ``k`` falls, between ``lowest`` and ``highest``."""
        target = self._target(k, chunks)
        for piece, byte, share in self._candidates(target):
            if lowest <= piece <= highest and abs(byte - target) * share * chunks <= self.nbytes:
                return piece
        return min(max(self._nearest_index(target), lowest), highest)

    def choices(self, k: int, chunks: int) -> tuple[int, ...]:
        """The pieces at which boundary ``k`` may fall by the rule, best first; the nearest index if there are none."""
        target = self._target(k, chunks)
        close = [p for p, b, share in self._candidates(target) if abs(b - target) * share * chunks <= self.nbytes]
        return tuple(dict.fromkeys(close)) or (self._nearest_index(target),)

    def _target(self, k: int, chunks: int) -> int:
        return (2 * self.nbytes * k + chunks) // (2 * chunks)

    def _candidates(self, target: int) -> Iterator[tuple[int, int, int]]:
        """Piece, byte and the share of a mean chunk within which it is taken, best first."""
        for borders, share in ((self._region_borders, REGION_TOLERANCE), (self._tensor_borders, TENSOR_TOLERANCE)):
            i = bisect_right(borders, target, key=lambda t: t.first_byte)
            for t in sorted(borders[max(i - 1, 0) : i + 1], key=lambda t: abs(t.first_byte - target)):
                yield t.first_piece, t.first_byte, share
        tensor = self.tensors[bisect_right(self._bytes, target) - 1]
        unit = alignment(tensor.spec.shape, tensor.dim)
        within = target - tensor.first_byte
        eighth = _nearest(within * FRACTIONS, tensor.size * tensor.piece_nbytes)
        index, rest = divmod(eighth * tensor.size, FRACTIONS)
        if rest == 0 and index % unit == 0:
            yield tensor.first_piece + index, tensor.first_byte + index * tensor.piece_nbytes, FRACTION_TOLERANCE
        index = min(_nearest(within, unit * tensor.piece_nbytes) * unit, tensor.size)
        yield tensor.first_piece + index, tensor.first_byte + index * tensor.piece_nbytes, ALIGNED_TOLERANCE

    def _nearest_index(self, target: int) -> int:
        tensor = self.tensors[bisect_right(self._bytes, target) - 1]
        return tensor.first_piece + _nearest(target - tensor.first_byte, tensor.piece_nbytes)

    def chunk(self, first: int, end: int) -> Chunk:
        """The chunk of the pieces from ``first`` up to ``end``."""
        slices: list[Slice] = []
        numel = nbytes = 0
        for i in range(bisect_right(self._first_pieces, first) - 1, bisect_left(self._first_pieces, end)):
            t = self.tensors[i]
            start = max(first - t.first_piece, 0)
            length = min(end - t.first_piece, t.size) - start
            slices.append(self._whole[i] if length == t.size else _slice(t, start, length))
            numel += length * t.piece_numel
            nbytes += length * t.piece_nbytes
        return Chunk(tuple(slices), numel, nbytes)


def _slice(t: _Tensor, start: int, length: int) -> Slice:
    """The slice of ``length`` pieces of a tensor from its piece ``start`` on."""
    return Slice(t.spec.name, t.dim, start * t.indices, length * t.indices, t.size * t.indices)


def _nearest(value: int, unit: int) -> int:
    """``value / unit`` rounded to the nearest whole number, halves up."""
    return (2 * value + unit) // (2 * unit)
