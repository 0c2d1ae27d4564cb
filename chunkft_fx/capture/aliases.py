"""Rewrites the graph that Dynamo traced, so that every output of a model that gets a gradient has memory of its own.

Outputs can be views of each other, of an input or of a weight, or one output can be another one,
detached. A step is one autograd node to the caller, and autograd cannot see through it that two of its results are the
same memory: gradients of one would be lost, or both would count as detached. A copy made inside the graph is a value
like any other, whose gradient adds up there.
Only outputs that share memory are copied, all but the largest of those that share it. An output that shares memory with
a weight is copied even if it gets no gradient: the buffer that holds a streamed weight will hold the next one later.

Before::

    h = torch._C._nn.linear(x, weight, bias)
    first = h[(slice(None, None, None), 0)]
    return (h, first)

After::

    h = torch._C._nn.linear(x, weight, bias)
    first = h[(slice(None, None, None), 0)]
    clone = first.clone()
    return (h, clone)
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx, nn

from chunkft_fx.torch_internals import dynamo_meta, dynamo_value, storage_key
from chunkft_fx.torch_sizes import hint


def separate_outputs(gm: fx.GraphModule) -> int:
    """Copy outputs of a Dynamo graph, in place, until no output that needs a gradient shares memory with another value,
    and no output shares memory with a weight.

    Returns how many were copied.
    """
    output = gm.graph.output_node()
    inputs = [(key, node) for node in gm.graph.find_nodes(op="placeholder") if (key := _storage(node)) is not None]
    given = {key for key, _ in inputs}
    weights = {key for key, node in inputs if isinstance(dynamo_value(node), nn.Parameter)}
    sharing: dict[int, list[fx.Node]] = defaultdict(list)
    for node in output.all_input_nodes:
        key = _storage(node)
        # an input that is returned stays the caller's own object
        if key is not None and node.op != "placeholder":
            sharing[key].append(node)
    copied: list[fx.Node] = []
    for key, nodes in sharing.items():
        copied += nodes if key in weights else _shared(nodes, key in given)
    for node in copied:
        with gm.graph.inserting_before(output):
            clone = gm.graph.call_method("clone", (node,))
        clone.meta = dynamo_meta(node)
        output.replace_input_with(node, clone)
    if copied:
        gm.graph.lint()
        gm.recompile()
    return len(copied)


def _shared(nodes: list[fx.Node], with_input: bool) -> list[fx.Node]:
    """Which of the outputs of one storage to copy, so that each with a gradient has memory of its own."""
    learning = [node for node in nodes if dynamo_value(node).requires_grad]
    if with_input or not learning:
        return learning
    kept = max(learning, key=lambda node: hint(dynamo_value(node).numel()))
    return [node for node in nodes if node is not kept]


def _storage(node: fx.Node) -> int | None:
    value = dynamo_value(node)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return storage_key(value)
