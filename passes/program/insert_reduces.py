"""insert_reduces: average each gradient of a parameter over ranks, as soon as the backward has completed it.

Contract: every gradient of a parameter that was an output of the program goes through one ``reduce`` node, which stands
behind the call that makes its last contribution, and whose result is the output in its place. It adds up the
contributions, and what earlier backward passes of the step have left, and begins to replace the sum by its mean over
ranks; that is complete behind the backward. All ranks have to run nodes of the same parameters in the same order.

Terms: a *contribution* is one region's gradient of a parameter, of which tied weights have several.

Before::

    layer_1: = self.layer_1_backward(saved, tangent);  gradient = layer_1[0]
    layer_0: = self.layer_0_backward(saved, layer_1[1])
    return (..., (gradient, layer_0[0]))

After::

    layer_1: = self.layer_1_backward(saved, tangent);  gradient = layer_1[0]
    mean = chunkft_fx.reduce([gradient])
    layer_0: = self.layer_0_backward(saved, layer_1[1])
    mean_1 = chunkft_fx.reduce([layer_0[0]])
    return (..., (mean, mean_1))
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import PARTS


@dataclass(frozen=True)
class InsertReduces:
    """Have nodes average the gradients of parameters over ranks within the backward."""

    name: str = "insert_reduces"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of gradients that are averaged."""
        output = module.graph.output_node()
        results: Any = output.args[0]
        outputs, mutations, gradients = results
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        contributions: dict[str, list[fx.Node]] = {}
        for node in gradients:
            name = node.meta.get("gradient_of")
            if name is not None:
                contributions.setdefault(name, []).append(node)
        means = {}
        for name, nodes in contributions.items():
            last = max(nodes, key=order.__getitem__)
            while last.next.target is operator.getitem:  # the items of one call stay together
                last = last.next
            with module.graph.inserting_after(last):
                mean = module.graph.call_function(ops.reduce, (nodes,))
            mean.meta |= {"gradient_of": name, "part": PARTS[1]}
            means[name] = mean
        kept = [means.get(node.meta.get("gradient_of"), node) for node in gradients]
        output.args = ((outputs, mutations, tuple(dict.fromkeys(kept))),)
        return len(means)
