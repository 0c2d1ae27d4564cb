"""Says which numbers symbolic sizes stand for: a capture for batches of any length is asked about a certain batch.

A graph that was traced with symbolic sizes holds for all of them. `Sizes` gives each symbol a value; every function
that counts bytes or time takes one, and counts with the values that were traced where none is given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.torch_internals import tree_leaves
from chunkft_fx.torch_sizes import falls_with, hint, size_symbol, substituted


@dataclass(frozen=True)
class Sizes:
    """Values of symbols by their names; a size with a symbol that has none counts with its traced value."""

    values: tuple[tuple[str, int], ...] = ()

    def of(self, size: int | torch.SymInt) -> int:
        """A size as a plain number."""
        return size if isinstance(size, int) else self._of(size)

    def _of(self, size: torch.SymInt) -> int:
        found = substituted(size, self.values) if self.values else None
        return hint(size) if found is None else found

    def nbytes(self, value: Any) -> int:
        """Bytes of a fake tensor's elements; 0 for what is no tensor."""
        return self.of(value.numel()) * value.element_size() if isinstance(value, Tensor) else 0

    def shape(self, value: Tensor) -> list[int]:
        """The shape of a fake tensor as plain numbers."""
        return [self.of(n) for n in value.shape]


AS_TRACED = Sizes()


@dataclass(frozen=True)
class SizeReader:
    """Reads the values of a graph's symbols off the arguments that it is called with.

    ``places`` has for each symbol the position of an argument, and the dimension whose size it is; None where the
    argument is the number itself. A larger value of a symbol in ``growing`` never needs less memory, anywhere in the
    graph.
    """

    places: tuple[tuple[str, int, int | None], ...]
    growing: frozenset[str]

    def read(self, arguments: Any) -> Sizes:
        """The sizes of a call."""
        values = ((n, arguments[i] if d is None else arguments[i].shape[d]) for n, i, d in self.places)
        return Sizes(tuple((name, int(value)) for name, value in values))

    def covers(self, planned: Sizes, sizes: Sizes) -> bool:
        """Whether memory that is enough for a batch of the sizes ``planned`` is enough for one of ``sizes``."""
        pairs = zip(planned.values, sizes.values, strict=True)
        return all(b <= a if name in self.growing else a == b for (name, a), (_, b) in pairs)

    def rounded(self, sizes: Sizes) -> Sizes:
        """Sizes that cover these and many others: each symbol in ``growing`` is rounded up, by less than a quarter."""
        return Sizes(tuple((n, round_up(v) if n in self.growing else v) for n, v in sizes.values))


def size_reader(graph: fx.Graph, primals: Iterable[str]) -> SizeReader:
    """The reader for a captured graph whose arguments are ``primals``."""
    by_name = {node.name: node for node in graph.find_nodes(op="placeholder")}
    places: dict[str, tuple[str, int, int | None]] = {}
    for i, name in enumerate(primals):
        value = by_name[name].meta["val"]
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for dim, size in sizes:
            symbol = size_symbol(size)
            if symbol is not None:
                places.setdefault(symbol, (symbol, i, dim))
    leaves = (leaf for node in graph.nodes for leaf in tree_leaves(node.meta.get("val")))
    found = [n for v in leaves for n in (_sizes_of(v) if isinstance(v, Tensor) else (v,))]
    falling = frozenset().union(*(falls_with(n) for n in found if isinstance(n, torch.SymInt)))
    return SizeReader(tuple(places.values()), frozenset(places) - falling)


def _sizes_of(value: Tensor) -> tuple[int | torch.SymInt, ...]:
    return *value.shape, value.untyped_storage().nbytes()


@functools.cache
def round_up(size: int) -> int:
    """The least of 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... that is not below a size."""
    step = 1 << max(size.bit_length() - 3, 0)
    return -(-size // step) * step
