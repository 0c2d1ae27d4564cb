"""offload_saved: keep what early regions save for their backward in host memory until it is needed.

Contract: a value that forward makes and only the backward of regions below ``below`` reads later is offloaded right
behind the region call that makes it, released on the device one call later (or behind its last reader in forward, if
that is later), and fetched again before the first backward call that reads it. Each value goes and comes once, also
when the backward of two neighbours reads it: the output of one is the input of the next. Values do not change.

What stays on the device: placeholders (weights, batch, tangents); outputs of the model and new values of buffers;
values that the backward of regions further apart reads (masks, rotary tables, an encoder's output); values that would
be back before any other region call has run without them; values smaller than ``smallest``, on another device, or with
gaps in their memory (views of a part of something).

Terms: a *copy* is what a fetch of a saved value returns, a tensor of its own (``ops.FRESH``), which dies with its last
use; *part* is as in `insert_streams`. Which region a call belongs to is in ``meta["region"]``, what a value looks like
in ``meta["val"]``.

Before::

    layer_0: = self.layer_0_forward(w0, embedded);  x = layer_0[0]
    layer_1: = self.layer_1_forward(w1, x)
    ...
    layer_1_backward: = self.layer_1_backward(w1, x, gradient)

After::

    layer_0: = self.layer_0_forward(w0, embedded);  x = layer_0[0]
    host: = chunkft_fx.offload([x]);  kept = host[0]
    layer_1: = self.layer_1_forward(w1, x)
    chunkft_fx.release([x])
    ...
    copies: = chunkft_fx.fetch([kept], device, FRESH);  copy = copies[0]
    chunkft_fx.wait([copy])
    layer_1_backward: = self.layer_1_backward(w1, copy, gradient)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.layout import run_strides
from chunkft_fx.graph.ops import PARTS
from chunkft_fx.passes.program.schedule_prefetch import PREFETCH_CALLS
from chunkft_fx.torch_sizes import hint

# Bytes below which a value stays. A copy of this size takes 20 us at the 51 GiB/s measured over the link, about what it
# costs the CPU to launch it and its events.
SMALLEST_NBYTES = 2**20
# Region calls between the one that makes a value and its release: the time in which its copy has to get out.
RELEASE_CALLS = 1


@dataclass(frozen=True)
class OffloadSaved:
    """Offload what the backward of regions below ``below`` reads, if it lies on ``device`` and is large enough."""

    below: int
    device: torch.device
    smallest: int = field(default_factory=lambda: SMALLEST_NBYTES)
    name: str = "offload_saved"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of values that are offloaded."""
        forward, backward = _Calls.of(module, False), _Calls.of(module, True)
        by_producer = {call: self._chosen(call, forward, backward) for call in forward.order}
        host: dict[fx.Node, fx.Node] = {}
        for call, values in by_producer.items():
            if values:
                host |= _offload(module.graph, call, values)
                _release(module.graph, forward, values)
        by_reader: dict[fx.Node, list[fx.Node]] = {}
        for value in host:
            by_reader.setdefault(backward.order[backward.first(value)], []).append(value)
        for call, values in by_reader.items():
            self._fetch(module.graph, call, {value: host[value] for value in values}, backward)
        return len(host)

    def _chosen(self, call: fx.Node, forward: _Calls, backward: _Calls) -> list[fx.Node]:
        items = [item for item in call.users if item.target is operator.getitem]
        return [item for item in items if self._goes(item, backward) and _is_away(item, forward, backward)]

    def _goes(self, value: fx.Node, backward: _Calls) -> bool:
        if any(user.op != "call_module" for user in value.users):
            return False  # the caller gets it
        readers = [int(user.meta["region"]) for user in value.users if user in backward.position]
        if not readers or max(readers) >= self.below or max(readers) - min(readers) > 1:
            return False
        held = value.meta.get("val")
        return isinstance(held, Tensor) and held.device == self.device and self._is_worth_it(held)

    def _is_worth_it(self, held: Tensor) -> bool:
        shape, strides = [hint(n) for n in held.shape], [hint(n) for n in held.stride()]
        if hint(held.numel()) * held.element_size() < max(self.smallest, 1):
            return False
        gapless = run_strides(shape, strides)
        return all(a == b for n, a, b in zip(shape, strides, gapless, strict=True) if n > 1)

    def _fetch(self, graph: fx.Graph, call: fx.Node, host: dict[fx.Node, fx.Node], backward: _Calls) -> None:
        with graph.inserting_before(call):
            copies = graph.call_function(ops.fetch, (list(host.values()), self.device, ops.FRESH))
            by_value = {value: _read_item(graph, copies, i) for i, value in enumerate(host)}
            wait = graph.call_function(ops.wait, (list(by_value.values()),))
        for node in (copies, *by_value.values(), wait):
            node.meta["part"] = PARTS[1]
        for value, copy in by_value.items():
            value.replace_all_uses_with(copy, delete_user_cb=backward.position.__contains__)


@dataclass(frozen=True)
class _Calls:
    """The region calls of one part, in order."""

    order: tuple[fx.Node, ...]
    position: dict[fx.Node, int]

    @classmethod
    def of(cls, module: fx.GraphModule, is_backward: bool) -> _Calls:
        calls = module.graph.find_nodes(op="call_module")
        order = tuple(c for c in calls if module.get_submodule(str(c.target)).is_backward == is_backward)
        return cls(order, {call: i for i, call in enumerate(order)})

    def readers(self, value: fx.Node) -> list[int]:
        """The positions of the calls that read a value."""
        return [self.position[user] for user in value.users if user in self.position]

    def first(self, value: fx.Node) -> int:
        """The position of the first call that reads a value."""
        return min(self.readers(value))


def _offload(graph: fx.Graph, call: fx.Node, values: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Offload values of a call right behind it; returns the host copy of each."""
    for value in reversed(values):
        call.append(value)  # what only backward reads is taken from the call there
    with graph.inserting_after(values[-1]):
        offload = graph.call_function(ops.offload, (values,))
    offload.meta["part"] = PARTS[0]
    host: dict[fx.Node, fx.Node] = {}
    place = offload
    for i, value in enumerate(values):
        with graph.inserting_after(place):
            host[value] = place = _read_item(graph, offload, i)
        place.meta["part"] = PARTS[0]
    return host


def _released_at(value: fx.Node, forward: _Calls) -> int:
    """The position of the call behind which a value is released: ``RELEASE_CALLS`` on, or its last reader's."""
    made = forward.position[value.all_input_nodes[0]]
    return min(max([made + RELEASE_CALLS, *forward.readers(value)]), len(forward.order) - 1)


def _is_away(value: fx.Node, forward: _Calls, backward: _Calls) -> bool:
    """Whether a region call runs between the release of a value and its fetch; if not, nothing is gained."""
    return _released_at(value, forward) < len(forward.order) - 1 or backward.first(value) > PREFETCH_CALLS


def _release(graph: fx.Graph, forward: _Calls, values: list[fx.Node]) -> None:
    """Release offloaded values, those that go at the same place together."""
    places: dict[int, list[fx.Node]] = {}
    for value in values:
        places.setdefault(_released_at(value, forward), []).append(value)
    for place, released in places.items():
        with graph.inserting_after(_end_of(forward.order[place])):
            release = graph.call_function(ops.release, (released,))
        release.meta["part"] = PARTS[0]


def _end_of(call: fx.Node) -> fx.Node:
    """The last of a call, its items, and an offload of theirs, which follow it at once."""
    node = call
    while node.next.target is operator.getitem or node.next.target is ops.offload:
        node = node.next
    return node


def _read_item(graph: fx.Graph, source: fx.Node, index: int) -> fx.Node:
    getitem: Callable[..., Any] = operator.getitem
    return graph.call_function(getitem, (source, index))
