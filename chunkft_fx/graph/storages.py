"""Predicts which values of a graph share memory, and how many bytes each of their storages has."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.torch_internals import returns_view, storage_key, tree_leaves

# A storage of a graph's fake values; views of each other share it.
Key = int


class Storages:
    """The storages under the values of a graph: ``keys`` of each node, one for each tensor of its (flat) value.

    Views share what they view. That is read off the operators, because a rewrite that makes a new fake value leaves
    the views of the old one as they were. Symbolic sizes count as ``sizes`` says.
    """

    def __init__(self, graph: fx.Graph, sizes: Sizes = AS_TRACED) -> None:
        self.sizes = sizes
        self.keys: dict[fx.Node, tuple[Key | None, ...]] = {}
        self.nbytes: dict[Key, int] = {}
        known: dict[int, Key] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "call_function"):
                self.keys[node] = tuple(self._find(node, known))

    def of(self, node: fx.Node) -> frozenset[Key]:
        """The storages under a node's value."""
        return frozenset(k for k in self.keys[node] if k is not None)

    def fresh(self, node: fx.Node) -> dict[Key, int]:
        """The storages that a node makes, with their bytes: none for a view."""
        given = {k for source in node.all_input_nodes for k in self.keys[source]}
        return {k: self.nbytes[k] for k in self.of(node) - given}

    def _find(self, node: fx.Node, known: dict[int, Key]) -> Iterator[Key | None]:
        leaves = tree_leaves(node.meta.get("val"))
        if node.target is operator.getitem:
            index: Any = node.args[1]
            yield self.keys[node.all_input_nodes[0]][index]
        elif (key := self._viewed(node)) is not None:
            yield from (key for _ in leaves)
        else:
            yield from (self._key(leaf, known) if isinstance(leaf, Tensor) else None for leaf in leaves)

    def _viewed(self, node: fx.Node) -> Key | None:
        """The storage that a node's results are views of; None if they are not (also the conjugate of a number)."""
        if not returns_view(node.target) or not node.all_input_nodes:
            return None
        keys = self.of(node.all_input_nodes[0])
        return next(iter(keys)) if len(keys) == 1 else None

    def _key(self, value: Tensor, known: dict[int, Key]) -> Key:
        """The storage of a fake tensor; sparse tensors count as if dense."""
        if value.layout is not torch.strided:
            key = known.setdefault(-id(value), len(known))
            self.nbytes[key] = self.sizes.nbytes(value)
            return key
        key = known.setdefault(storage_key(value), len(known))
        self.nbytes[key] = self.sizes.of(value.untyped_storage().nbytes())
        return key


def weight_views(graph: fx.Graph, weights: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes whose values can share memory with one of these inputs, in the graph's order; not the inputs.

    A streamed weight is in its buffer from a fetch to a release, and an update in the backward changes it in place. So
    a view of a weight lives within one call of a region: another call takes it anew, or is given a copy.
    """
    known = set(weights)
    found = []
    for node in graph.nodes:
        can_view = node.op == "call_function" and (node.target is operator.getitem or returns_view(node.target))
        if can_view and node.all_input_nodes and node.all_input_nodes[0] in known:
            known.add(node)
            found.append(node)
    return found
