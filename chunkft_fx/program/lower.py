"""Writes a variant's partitioned FX graphs as callables, once for each variant and direction."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from chunkft_fx.graph.effects import with_bare_assertions
from chunkft_fx.graph.sub_graphs import opened
from chunkft_fx.program.variants import Variant
from chunkft_fx.torch_internals import cache_hits, compile_graph, graph_module

log = logging.getLogger("chunkft_fx.program.lower")
aten = torch.ops.aten

Run = Callable[[list[Any]], Sequence[Any]]


def lower(variant: Variant, backend: str, fake_mode: Any, is_backward: bool) -> Run:
    """The callable for one direction of a variant: it takes a list of inputs, which it may empty.

    ``backend="eager"`` runs the FX graph as it is; ``"inductor"`` compiles it. Made on first use.
    """
    made = variant.run_backward if is_backward else variant.run_forward
    if made is not None:
        return made
    module = variant.backward if is_backward else variant.forward
    assert module is not None
    start, hits = time.perf_counter(), cache_hits()
    if backend == "eager":
        run = _eager(module)
    else:
        run = compile_graph(with_bare_assertions(opened(module)), fake_mode, is_backward)
    seconds = time.perf_counter() - start
    direction, how = "backward" if is_backward else "forward", " from Inductor's cache" if cache_hits() > hits else ""
    log.debug("variant %d %s: lowered in %.2f s%s", variant.index, direction, seconds, how)
    if is_backward:
        variant.run_backward = run
    else:
        variant.run_forward = run
    return run


def _eager(module: fx.GraphModule) -> Run:
    runnable = graph_module(module, _viewing_any_strides(module.graph))

    def run(inputs: list[Any]) -> Sequence[Any]:
        results: Sequence[Any] = runnable(*inputs)
        return results

    return run


def _viewing_any_strides(original: fx.Graph) -> fx.Graph:
    """A copy of a graph whose views copy where the memory order asks for it.

    Some operators lay results out otherwise than torch's tracing says, such as the backward of softplus and elu
    on a transposed gradient. A view that was traced on the one order may not exist in the other.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(original, {}))
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default
    return graph
