"""schedule_prefetch: begin every fetch as early as the ring of buffers allows, or as is worth its memory.

Contract: only fetches move (with the items taken from them). The n-th fetch of a part through the ring moves up to
right behind the release that frees its buffer, that of use ``n - depth``; the first ``depth`` of a part move to its
beginning, in order. A fetch of saved values, which takes memory of its own, moves before the backward call that is
``PREFETCH_CALLS`` ahead of the one that needs it. Copies then run under the compute of the uses before.

Terms: *part* and *use* as in `insert_streams`; ``depth`` is the number of buffers, read off the fetches.

Before (two buffers)::

    fetch 0, wait 0, call 0, release 0, fetch 1, wait 1, call 1, release 1, fetch 2, wait 2, call 2, release 2

After::

    fetch 0, fetch 1, wait 0, call 0, release 0, fetch 2, wait 1, call 1, release 1, wait 2, call 2, release 2

Before (saved values)::

    fetch 0, wait 0, call 0, fetch 1, wait 1, call 1

After::

    fetch 0, wait 0, fetch 1, call 0, wait 1, call 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import PARTS

# Backward calls under which a fetch of saved values runs. One is enough: what a recomputing block keeps is its input,
# 64 MiB for 8x1024 tokens of a 7B model, 1.3 ms over the link, and its backward takes 11 ms. With more, more
# copies would be alive at once.
PREFETCH_CALLS = 1


@dataclass(frozen=True)
class SchedulePrefetch:
    """Hoist the fetches of each part of a program."""

    name: str = "schedule_prefetch"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of fetches that moved."""
        moved = sum(self._hoist(module, part) for part in PARTS) + self._hoist_saved(module)
        module.graph.lint()
        return moved

    def _hoist_saved(self, module: fx.GraphModule) -> int:
        calls: list[fx.Node] = []
        moved = 0
        waiting: list[fx.Node] = []
        for node in list(module.graph.nodes):
            if node.target is ops.fetch and _buffer(node) == ops.FRESH:
                waiting.append(node)
            if node.op == "call_module" and _part(module, node) == PARTS[1]:
                calls.append(node)
                place = calls[max(len(calls) - 1 - PREFETCH_CALLS, 0)]
                # before the first call nothing hides a copy: its own fetch stays in front of its wait
                moved += sum(_move(fetch, place) for fetch in waiting if place is not node)
                waiting = []
        return moved

    def _hoist(self, module: fx.GraphModule, part: str) -> int:
        nodes = list(module.graph.nodes)
        fetches = [n for n in nodes if n.target is ops.fetch and n.meta["part"] == part and _buffer(n) != ops.FRESH]
        releases = [n for n in nodes if n.target is ops.release and n.meta["part"] == part and _is_of_ring(n)]
        if not fetches:
            return 0
        depth = 1 + max(_buffer(f) for f in fetches)
        # states that come in before the backward stand in front: they need not wait for the forward
        first = next(n for n in nodes if _part(module, n) == part and n.target is not ops.fetch_states)
        moved = 0
        for n, fetch in enumerate(fetches):
            # the beginning is a place before a node that never moves, so the first fetches keep their order
            place = first if n < depth else releases[n - depth].next
            moved += _move(fetch, place)
            if fetch is first:
                first = _after_items(fetch)
        return moved


def _buffer(fetch: fx.Node) -> int:
    buffer: Any = fetch.args[2]
    return int(buffer)


def _is_of_ring(release: fx.Node) -> bool:
    """Whether a release frees a buffer, not the device memory of an offloaded value."""
    return release.all_input_nodes[0].all_input_nodes[0].target is ops.fetch


def _part(module: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op != "call_module":
        part: str | None = node.meta.get("part")
        return part
    return PARTS[bool(module.get_submodule(str(node.target)).is_backward)]


def _after_items(fetch: fx.Node) -> fx.Node:
    node = fetch.next
    while node in fetch.users:
        node = node.next
    return node


def _move(fetch: fx.Node, place: fx.Node) -> bool:
    """Put a fetch and its items before ``place``; False if they stand there."""
    if fetch is place:
        return False
    items = list(fetch.users)
    if _after_items(fetch) is place:
        return False
    for node in (fetch, *items):
        place.prepend(node)
    return True
