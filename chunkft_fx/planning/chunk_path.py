"""Decides chunk boundaries by a shortest path: of all places where `plan.cuts` may cut, those of the cheapest sweep.

Boundary ``k`` of ``n`` has a few candidates; they are the nodes of a directed graph in ``n - 1`` layers, between the
beginning and the end of the parameters. An edge is the chunk between two boundaries, and weighs what a step on it
costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import networkx as nx

from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.cuts import ParameterSpec, Stream, cut

# A node is the number of a boundary and the piece at which it falls.
Node = tuple[int, int]
# What each place down a boundary's list of candidates adds to the chunk that it ends, as a share of the chunk's cost:
# later ones make variants of their own, each of which takes a second or two to compile, or worse products.
PREFERENCE_SHARE = 0.01


def cheapest_chunks(
    parameters: Sequence[ParameterSpec], count: int, cost: Callable[[Chunk], float]
) -> tuple[Chunk, ...]:
    """Cut the parameters into ``count`` chunks so that ``cost``, added up over chunks, is least.

    Boundaries fall only where `plan.cuts` allows, so no chunk is far from the mean. ``cost`` is asked once an edge and
    must be positive. Raises `ChunkCountError` as `cut` does.
    """
    usual = cut(parameters, count)
    stream = Stream(parameters)
    graph = boundary_graph(stream, count, cost)
    first, last = (0, 0), (count, stream.pieces)
    if first not in graph or last not in graph or not nx.has_path(graph, first, last):
        return usual  # so many chunks that candidates of neighbouring boundaries coincide
    path: list[Node] = nx.dijkstra_path(graph, first, last, weight="cost")
    return tuple(graph.edges[a, b]["chunk"] for a, b in pairwise(path))


def boundary_graph(stream: Stream, count: int, cost: Callable[[Chunk], float]) -> nx.DiGraph:
    """The graph of all candidate boundaries; edges carry their ``chunk`` and ``cost``."""
    graph = nx.DiGraph()
    layers = [(0,), *(stream.choices(k, count) for k in range(1, count)), (stream.pieces,)]
    for k in range(count):
        for begin in layers[k]:
            for place, end in enumerate(layers[k + 1]):
                if begin < end:
                    chunk = stream.chunk(begin, end)
                    weight = cost(chunk) * (1 + PREFERENCE_SHARE * place)
                    graph.add_edge((k, begin), (k + 1, end), chunk=chunk, cost=weight)
    return graph
