"""Writes into a part's graph what it is told of the whole batch, and the graph that computes these numbers.

A loss that is a mean over the labels that count becomes the sum over those of the part, divided by the number of labels
of the whole batch; a number of the batch that the model computes by itself, such as the sum of a mask, is replaced.
Both are inputs of the part's graph then, one tensor of one element each, behind the inputs that it has::

    before: loss = nll_loss_forward(scores, labels, None, 1, -100)[0]
    after:  loss = nll_loss_forward(scores, labels, None, 2, -100)[0] / told_0

A part in which no label counts gives a loss and gradients of zero, where its own mean would be 0 / 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.capture.capture import Capture, OutputName
from chunkft_fx.graph.rewrite import insert_before
from chunkft_fx.head import operators as head
from chunkft_fx.splitting.proof import Proof
from chunkft_fx.torch_internals import graph_module, named_arguments

aten = torch.ops.aten

_SUM = 2  # torch's number for the sum of losses
# Arguments of a head's loss; in its backward operator they follow the tangent.
_OPERANDS = 7

Compute = Callable[[Sequence[Any]], tuple[Tensor, ...]]


def teller(whole: Capture, proof: Proof) -> Compute:
    """What computes the told numbers from the inputs of the whole batch's graph, in order."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    wanted = [w for w, _ in proof.told]
    needed = _ancestors([*wanted, *(n for w, _ in proof.label_means for n in _labels(w) if isinstance(n, fx.Node))])
    for node in whole.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    numbers = [copies[w] for w in wanted]
    for w, _ in proof.label_means:
        labels, weight, ignored = fx.map_arg(_labels(w), copies.__getitem__)
        numbers.append(_count(graph, labels, weight, ignored, _scalar(w).dtype))
    graph.output(tuple(numbers))
    module, names = graph_module({}, graph), [n.name for n in graph.find_nodes(op="placeholder")]

    def compute(inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        values: Mapping[str, Any] = dict(zip(whole.primals, inputs, strict=True)) | whole.constants
        with torch.no_grad():
            return tuple(module(*(values[name] for name in names)))

    return compute


def tell(part: Capture, proof: Proof) -> Capture:
    """The capture of a part with the told numbers as its last inputs; the part itself stays as it is."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in part.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        assert copies[node].name == node.name, "a capture names nodes"
    part = replace(part, graph=graph)
    renamed: dict[str, str] = {}
    names = [_replaced(part, i, copies[m], renamed) for i, (_, m) in enumerate(proof.told)]
    names += [_divided(part, len(names) + i, copies[m], renamed) for i, (_, m) in enumerate(proof.label_means)]
    graph.lint()
    outputs = tuple(OutputName(renamed.get(o, o)) if isinstance(o, OutputName) else o for o in part.outputs)
    return replace(part, primals=(*part.primals, *names), outputs=outputs)


def _replaced(part: Capture, number: int, node: fx.Node, renamed: dict[str, str]) -> str:
    placeholder = _placeholder(part, number, node.meta["val"])
    node.replace_all_uses_with(placeholder)
    renamed[node.name] = placeholder.name
    _drop(node)
    return placeholder.name


def _divided(part: Capture, number: int, loss: fx.Node, renamed: dict[str, str]) -> str:
    """Have a loss be the sum over labels, divided by what is told."""
    count = _placeholder(part, number, _scalar(loss))
    if loss.target is head.forward:
        for backward in part.graph.find_nodes(op="call_function", target=head.backward):
            if backward.args[1 : 1 + _OPERANDS] == loss.args:
                # where no label counts at all, gradients are zero, though the loss is 0 / 0
                divisor = insert_before(backward, aten.clamp_min.default, (count, 1))
                tangent = insert_before(backward, aten.div.Tensor, (backward.args[0], divisor))
                backward.args = (tangent, *backward.args[1:_OPERANDS], False, *backward.args[1 + _OPERANDS :])
        loss.args = (*loss.args[: _OPERANDS - 1], False)
        _divide(loss, count, renamed)
        return count.name
    loss.args = tuple(_SUM if i == 3 else a for i, a in enumerate(loss.args))
    for item in list(loss.users):
        if item.args[1] == 0:
            _divide(item, count, renamed)
        else:  # the weight of all labels, of which the backward's own mean makes use
            item.replace_all_uses_with(count)
            part.graph.erase_node(item)
    return count.name


def _divide(loss: fx.Node, count: fx.Node, renamed: dict[str, str]) -> None:
    mean = insert_before(loss.next, aten.div.Tensor, (loss, count), like=loss)
    renamed[loss.name] = mean.name
    loss.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)


def _placeholder(part: Capture, number: int, value: Any) -> fx.Node:
    """A new input of a part's graph, behind those that it has and before the tangents."""
    last = next(n for n in reversed(part.graph.find_nodes(op="placeholder")) if n.name not in part.tangents)
    with part.graph.inserting_after(last):
        made = part.graph.placeholder(f"told_{number}")
    made.meta |= {"val": value, "partitioner_tag": "is_forward", "module_path": None}
    return made


def _drop(node: fx.Node) -> None:
    """Erase a node that nothing reads any more, and what only it read."""
    if node.users or node.op == "placeholder":
        return
    read = node.all_input_nodes
    node.graph.erase_node(node)
    for other in read:
        _drop(other)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _labels(loss: fx.Node) -> tuple[Any, Any, Any]:
    """The labels of a loss, the weights of its classes if it has any, and the label that is ignored."""
    given = named_arguments(loss)
    if loss.target is head.forward:
        return given["labels"], None, given["ignore_index"]
    return given["target"], given["weight"], given["ignore_index"]


def _scalar(loss: fx.Node) -> Any:
    value = loss.meta["val"]
    return value if isinstance(value, Tensor) else value[0]


def _count(graph: fx.Graph, labels: Any, weight: Any, ignored: int, dtype: torch.dtype) -> fx.Node:
    """The number of labels that count, or the sum of their classes' weights."""
    call = graph.call_function
    counts = call(aten.ne.Scalar, (labels, ignored))
    if weight is not None:
        safe = call(aten.reshape.default, (call(aten.mul.Tensor, (labels, counts)), [-1]))
        weights = call(aten.index_select.default, (weight, 0, safe))
        counts = call(aten.mul.Tensor, (weights, call(aten.reshape.default, (counts, [-1]))))
    return call(aten._to_copy.default, (call(aten.sum.default, (counts,)),), {"dtype": dtype})
