"""Rewrites a model's graph to use the chunked head: a projection with the cross-entropy behind it becomes one operator.

The rewrite works on the graph that Dynamo traced, before autograd sees it: there the projection and the loss still are
one call each, as the user or a library wrote them. It looks for an ``F.linear`` whose result reaches
``F.cross_entropy`` through casts, ``contiguous``, slices of the token dimensions (as in the shift by one token) and
then views that keep the classes apart. Those commute with a projection, so they are applied to its input instead.
Anything else is left as it is, with the reason logged: dense logits are always right.

Where the model returns the logits, its graph returns ``None`` in their place, and the session `MissingLogits`.

Before::

    logits = torch._C._nn.linear(hidden, weight, None);  logits_1 = logits.float()
    logits_2 = logits_1.view(-1, 128256)
    loss = torch.nn.functional.cross_entropy(logits_2, labels, ignore_index = -100)
    return (loss, logits)

After::

    rows = hidden.reshape(-1, 4096);  labels_1 = labels.reshape(-1)
    loss = chunkft_fx.linear_cross_entropy(rows, weight, None, labels_1, -100, 0.0, True)
    return (loss, None)
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.head import operators as head
from chunkft_fx.torch_internals import dynamo_meta, dynamo_value

log = logging.getLogger("chunkft_fx.head.rewrite")

_LINEAR = functional.linear
_CASTS = ("float", "double", "to", "type", "bfloat16", "half")
_VIEWS = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "unflatten")
_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
)  # fmt: skip
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Head:
    """A head as found: the projection, what stands between it and the loss, and the loss with its arguments.

    ``selections`` are the slices of tokens among ``between``, first to last.
    """

    linear: fx.Node
    between: tuple[fx.Node, ...]
    selections: tuple[fx.Node, ...]
    loss: fx.Node
    labels: fx.Node
    ignore_index: int
    label_smoothing: float
    mean: bool


def chunk_head(gm: fx.GraphModule) -> int:
    """Rewrite every head of a Dynamo graph in place; returns how many were rewritten."""
    rewritten = 0
    for loss in gm.graph.find_nodes(op="call_function", target=functional.cross_entropy):
        found = _match(loss)
        if isinstance(found, str):
            log.debug("logits of %s stay whole: %s", loss.name, found)
            continue
        _rewrite(found)
        rewritten += 1
    if rewritten:
        gm.graph.lint()
        gm.recompile()
    return rewritten


def _match(loss: fx.Node) -> _Head | str:
    """The head that ends in a cross-entropy, or why it is none."""
    given = _arguments(loss)
    if isinstance(given, str):
        return given
    path = _path(given["input"])
    if isinstance(path, str):
        return path
    linear, between, selections = path
    chain = (linear, *between)
    for node in chain:
        stranger = next((u for u in node.users if u not in chain and u is not loss and u.op != "output"), None)
        if stranger is not None:
            return f"{stranger.name} reads them too"
    problem = _problem(linear, given["input"], given["target"])
    if problem:
        return problem
    if _writes_between(linear, loss):
        return "something is changed in place between projection and loss"
    return _Head(
        linear, between, selections, loss, given["target"], given["ignore_index"], given["label_smoothing"],
        given["reduction"] == "mean",
    )  # fmt: skip


def _arguments(loss: fx.Node) -> dict[str, Any] | str:
    """The arguments of the cross-entropy by name, if they are of the kinds the operator takes."""
    bound = inspect.signature(functional.cross_entropy).bind(*loss.args, **loss.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if any(given[name] is not None for name in ("weight", "size_average", "reduce")):
        return "class weights and the deprecated reduction flags are not supported"
    if given["reduction"] not in ("mean", "sum"):
        return f"reduction {given['reduction']!r} keeps a loss for each token"
    if not isinstance(given["ignore_index"], int) or not isinstance(given["label_smoothing"], (int, float)):
        return "ignore_index or label_smoothing is not a constant"
    if not isinstance(given["input"], fx.Node) or not isinstance(given["target"], fx.Node):
        return "logits or labels are no values of the graph"
    return given


def _path(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], tuple[fx.Node, ...]] | str:
    """The projection above the loss, the nodes between, and the token slices among these, in graph order."""
    between: list[fx.Node] = []
    selections: list[fx.Node] = []
    while node.target is not _LINEAR:
        source = node.args[0] if node.args else None
        if node.op not in ("call_method", "call_function") or not isinstance(source, fx.Node):
            return "they come from no projection"
        before, after = _value(source), _value(node)
        if before is None or after is None or before.device != after.device:
            return f"{node.name} is not understood"
        name = _method(node)
        if node.target is operator.getitem and _keeps_classes(before, node.args[1]):
            selections.append(node)
        elif not _is_plain(name, before, after):
            return f"{node.name} changes them"
        elif selections and name in _VIEWS:
            return f"{node.name} reshapes them before tokens are selected"
        between.append(node)
        node = source
    return node, tuple(reversed(between)), tuple(reversed(selections))


def _method(node: fx.Node) -> str:
    """The name of a tensor method, called as such or as a function of torch."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    return name if getattr(torch, name, None) is node.target else ""


def _is_plain(method: str, before: Tensor, after: Tensor) -> bool:
    """Whether a method only casts upwards, copies, or views tokens differently."""
    if method == "contiguous":
        return True
    if method in _CASTS:
        return after.dtype in (before.dtype, wide_dtype(before.dtype))
    # the classes stay the innermost dimension, so the rows keep their order
    return method in _VIEWS and after.ndim > 0 and _same(after.shape[-1], before.shape[-1])


def _keeps_classes(value: Tensor, index: Any) -> bool:
    """Whether an index selects tokens by slices, and every class of them."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(i is Ellipsis or isinstance(i, slice) or type(i) is int for i in items):
        return False
    if items[-1] == slice(None):
        return True
    # an ellipsis at the end stands for the classes unless there are as many items before it as dimensions
    return len(items) < value.ndim + (items[-1] is Ellipsis) and (Ellipsis not in items[:-1])


def _problem(linear: fx.Node, logits: fx.Node, labels: fx.Node) -> str | None:
    """What keeps values of these shapes and dtypes from the operator, if anything does."""
    operands = [_value(n) for n in (*_operands(linear), linear, logits, labels) if n is not None]
    if any(v is None for v in operands):
        return "not all values are known"
    hidden, weight, *_, projected, last, wanted = (v for v in operands if v is not None)
    floating = [v.dtype for v in operands[:-2] if v is not None]
    if len(set(floating)) > 1 or hidden.dtype not in _DTYPES:
        return f"the projection mixes the dtypes {', '.join(str(d) for d in dict.fromkeys(floating))}"
    if hidden.ndim < 2 or weight.ndim != 2 or not all(isinstance(s, int) for s in weight.shape):
        return "the projection is not one of rows by a matrix of fixed size"
    if last.ndim != 2 or wanted.ndim != 1:
        return "classes are not the last of two dimensions"
    if wanted.dtype != torch.int64 or wanted.device != projected.device:
        return "labels are no class indices on the device of the logits"
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        return "there are no classes or no features"
    return None


def _writes_between(linear: fx.Node, loss: fx.Node) -> bool:
    """Whether an operator writes memory between the two: the projection would then see other values at the loss."""
    node = linear.next
    while node is not loss:
        name = str(getattr(node.target, "__name__", node.target))
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or node.target in _IN_PLACE or node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
            return True
        node = node.next
    return False


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a projection."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, linear.args, strict=False)) | dict(linear.kwargs)
    return given["input"], given["weight"], given.get("bias")


def _rewrite(found: _Head) -> None:
    graph, loss = found.loss.graph, found.loss
    hidden, weight, bias = _operands(found.linear)
    features = _shape(weight)[1]
    with graph.inserting_before(loss):
        for selection in found.selections:
            hidden = graph.call_function(operator.getitem, (hidden, selection.args[1]))
        rows = graph.call_method("reshape", (hidden, -1, features))
        new = graph.call_function(
            head.forward,
            (rows, weight, bias, found.labels, found.ignore_index, float(found.label_smoothing), found.mean),
        )
        result = graph.call_method("to", (new, _dtype(loss)))
    # the module that owns the projection owns the head
    for node in (rows, new, result):
        node.meta = dynamo_meta(found.linear)
    result.meta = dynamo_meta(found.linear, dynamo_value(loss))
    loss.replace_all_uses_with(result)
    graph.erase_node(loss)
    chain = {found.linear, *found.between}
    output = graph.output_node()
    output.args = fx.map_arg(output.args, _without(chain))
    for node in reversed((found.linear, *found.between)):
        graph.erase_node(node)


def _without(chain: set[fx.Node]) -> Callable[[fx.Node], Any]:
    return lambda node: None if node in chain else node


def _value(node: Any) -> Tensor | None:
    value = dynamo_value(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _shape(node: fx.Node) -> torch.Size:
    return dynamo_value(node).shape


def _dtype(node: fx.Node) -> torch.dtype:
    return dynamo_value(node).dtype


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b
