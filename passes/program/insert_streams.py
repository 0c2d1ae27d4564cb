"""insert_streams: bring weights that live in host memory to the device, one fetch a use.

Contract: every region call reads streamed weights only from copies that were fetched for this very use; they
occupy one buffer of the ring, are waited for right before the use and released right behind it. The n-th use
of a part (forward or backward) takes buffer ``n % depth``, so that equal plans give equal programs. Values do
not change: the copies are bitwise the weights.

Terms: a *use* is a region call that reads at least one streamed weight, or the calls of the same region for several
micro-batches, which follow one another; its *part* is forward or backward, and every stream node says in
``meta["part"]`` which it belongs to.

Before::

    layer_0: = self.layer_0_forward(weight, x)        # weight lives in host memory

After::

    copies: = chunkft_fx.fetch([weight], device, 0);  copy = copies[0]
    chunkft_fx.wait([copy])
    layer_0: = self.layer_0_forward(copy, x)
    chunkft_fx.release([copy])
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx

from chunkft_fx.graph import ops


@dataclass(frozen=True)
class InsertStreams:
    """Stream the parameters named in ``streamed`` through ``depth`` buffers on ``device``."""

    streamed: frozenset[str]
    device: torch.device
    depth: int
    name: str = "insert_streams"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of fetches."""
        uses: Counter[str] = Counter()
        for target, calls in groupby(module.graph.find_nodes(op="call_module"), lambda call: str(call.target)):
            use = list(calls)
            weights = [a for a in dict.fromkeys(use[0].args) if self._is_streamed(a)]
            if not weights:
                continue
            part = ops.PARTS[bool(module.get_submodule(target).is_backward)]
            self._stream(module.graph, use, weights, uses[part] % self.depth, part)
            uses[part] += 1
        return uses.total()

    def _is_streamed(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument.meta.get("parameter") in self.streamed

    def _stream(self, graph: fx.Graph, use: list[fx.Node], weights: list[fx.Node], buffer: int, part: str) -> None:
        getitem: Callable[..., Any] = operator.getitem
        with graph.inserting_before(use[0]):
            copies = graph.call_function(ops.fetch, (weights, self.device, buffer))
            by_weight = {w: graph.call_function(getitem, (copies, i)) for i, w in enumerate(weights)}
            wait = graph.call_function(ops.wait, (list(by_weight.values()),))
        with graph.inserting_after(use[-1]):
            release = graph.call_function(ops.release, (list(by_weight.values()),))
        for call in use:
            call.args = tuple(by_weight.get(a, a) if isinstance(a, fx.Node) else a for a in call.args)
        for node in (copies, *by_weight.values(), wait, release):
            node.meta["part"] = part
