"""Cuts optimizer states in host memory into blocks, each with its place in one of a checkpoint's files.

A block is some rows of one state tensor, as they lie in memory: the parameter's cut dimension in front, which is how
files have them, too. So a block is written from where it is kept. Only masters that are kept as remainders are put
together first, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkft_fx.checkpoints.disk.sums import BLOCK_NBYTES
from chunkft_fx.checkpoints.disk.tensor_file import Kind, Layout, as_bytes, layout
from chunkft_fx.graph.layout import front, size_along
from chunkft_fx.kernels.masters import join_master
from chunkft_fx.plan.chunk import ALL, Share, Slice
from chunkft_fx.plan.cuts import cut_dim
from chunkft_fx.plan.state_spec import MASTER, REMAINDER, StateSpec

# Bytes of a file of states, at most, unless a single tensor has more.
SHARD_NBYTES = 2 * 2**30
# Elements of masters that are put together at once.
JOINED_NUMEL = 2**18


@dataclass(frozen=True)
class SavedTensor:
    """A state tensor of parameter ``name``: rows as host memory has them, and the weight's where it takes both.

    ``weight`` gives the rows of the parameter that ``rows`` are the remainder of. A tensor that is not ``is_sliced``
    belongs to the whole parameter, whatever of it changes; one that ``is_turned`` has the parameter's shape, but the
    cut dimension in front. ``kind`` is that of the whole tensor, of which ``rows`` begin at row ``first``.
    """

    name: str
    key: str
    rows: Tensor
    kind: Kind
    is_sliced: bool
    is_turned: bool
    weight: Callable[[], Tensor] | None = None
    first: int = 0


class Block:
    """Some rows of a state tensor, with their place in a file. What it holds can be copied before it changes."""

    def __init__(self, tensor: SavedTensor, rows: Tensor, first: int, file: int, start: int) -> None:
        self.name, self.key, self.is_sliced = tensor.name, tensor.key, tensor.is_sliced
        self.file, self.start = file, start
        self.first, self.count = first, len(rows)
        self._rows, self._weight = rows, tensor.weight
        self.is_copy = False

    @property
    def held_nbytes(self) -> int:
        """Bytes that a copy of it takes."""
        return self._rows.nbytes

    def is_of(self, s: Slice) -> bool:
        """Whether an update of this slice changes it."""
        return not self.is_sliced or (s.start < self.first + self.count and self.first < s.start + s.length)

    def copy(self) -> None:
        """From now on hold a copy."""
        self._rows, self.is_copy = self._rows.clone(), True

    def data(self) -> memoryview:
        """What is to be written."""
        if self._weight is None:
            return as_bytes(self._rows)
        weight = self._weight()[self.first : self.first + self.count]
        whole = torch.empty(self._rows.shape, dtype=torch.float32)
        step = max(1, JOINED_NUMEL * self.count // self._rows.numel())
        for first in range(0, self.count, step):  # for what is computed in between
            rows = slice(first, first + step)
            whole[rows] = join_master(weight[rows].to("cpu"), self._rows[rows])
        return as_bytes(whole)

    def drop(self) -> None:
        """Let go of what it holds."""
        self._rows, self._weight = torch.empty(0), None


def saved_tensors(
    named: Sequence[tuple[str, Tensor]],
    states: Mapping[Tensor, Mapping[str, object]],
    spec: StateSpec,
    weight_of: Callable[[Tensor], Callable[[], Tensor]],
    share: Share = ALL,
) -> Iterator[SavedTensor]:
    """The state tensors of these parameters, by name, that were updated so far; of several ranks, those of a share."""
    for name, parameter in named:
        dim = cut_dim(parameter.shape)
        for state, lies in spec.layouts(parameter).items():
            kept = states[parameter][state] if parameter in states else None
            if not isinstance(kept, Tensor):
                continue
            is_remainder = state == REMAINDER
            rows = lies.front(kept, dim)
            rows = rows if rows.ndim else rows.view(1)
            first, size = 0, len(rows)
            if lies.is_sliced:
                size = size_along(parameter, dim)
                first = share.of(size)[0]
            kind = Kind(torch.float32 if is_remainder else rows.dtype, (size, *rows.shape[1:]))
            key = f"{name}.{MASTER if is_remainder else state}"
            is_turned = lies.is_sliced and not lies.by_index
            weight = weight_of(parameter) if is_remainder else None
            yield SavedTensor(name, key, rows, kind, lies.is_sliced, is_turned, weight, first)


def into_files(tensors: Sequence[SavedTensor], shard_nbytes: int) -> tuple[list[Layout], list[Block]]:
    """The files that hold these tensors, in order, and all their blocks."""
    shards: list[list[SavedTensor]] = []
    filled = 0
    for t in tensors:
        if not shards or filled + t.kind.nbytes > shard_nbytes:
            shards.append([])
            filled = 0
        shards[-1].append(t)
        filled += t.kind.nbytes
    layouts = [layout({t.key: t.kind for t in shard}) for shard in shards]
    return layouts, [b for i, shard in enumerate(shards) for t in shard for b in _blocks(t, i, layouts[i])]


def _blocks(t: SavedTensor, file: int, lies: Layout) -> Iterator[Block]:
    row_nbytes = t.kind.nbytes // max(t.kind.shape[0], 1)
    step = max(1, BLOCK_NBYTES // max(row_nbytes, 1))
    start = lies.places[t.key].start
    for first in range(0, len(t.rows) if row_nbytes else 0, step):
        at = t.first + first
        yield Block(t, t.rows[first : first + step], at, file, start + at * row_nbytes)


def weight_rows(weight: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
    """The rows of a weight of this shape, looked up when they are needed."""
    return lambda: front(weight, cut_dim(shape))
