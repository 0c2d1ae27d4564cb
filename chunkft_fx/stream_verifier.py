"""Stream verifier: proves that a program's fetches are waited for, used in time, and never overwritten.

It walks a program once and follows every buffer of the ring through ``free → filling → ready → free``. What it
proves holds for any timing of the copies: nothing between a fetch and its wait reads the buffer, and nothing
between a wait and its release fills it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from chunkft_fx import ops
from chunkft_fx.errors import VerificationError
from chunkft_fx.passes.insert_streams import PARTS


@dataclass
class _Ring:
    """Which fetch occupies each buffer, and which fetches were waited for and released."""

    depth: int
    occupied: dict[int, fx.Node] = field(default_factory=dict)
    ready: set[fx.Node] = field(default_factory=set)
    released: set[fx.Node] = field(default_factory=set)


def verify_streams(module: fx.GraphModule, streamed: frozenset[str], depth: int) -> None:
    """Check a program's stream nodes; raises `VerificationError` that names the node and the broken rule.

    The rules: a fetch brings host tensors into a free buffer of ``depth``; all of a fetch's copies are waited for
    together, before their first use; every use lies between the wait and the release; each fetch is released once,
    within its own part of the step; no region call reads a streamed weight from the host.
    """
    ring = _Ring(depth)
    part = PARTS[0]
    for node in module.graph.nodes:
        if node.op == "call_module" and module.get_submodule(str(node.target)).is_backward and part != PARTS[1]:
            part = PARTS[1]
            late = [f for f in ring.occupied.values() if f.meta.get("part") != part]
            if late:
                raise _broken(late[0], "holds its buffer beyond the forward part")
        if node.target is ops.fetch:
            _fetch(node, ring)
        elif node.target is ops.wait:
            _wait(node, ring)
        elif node.target is ops.release:
            _release(node, ring)
        elif node.op != "placeholder" and node.target is not operator.getitem:
            _use(node, ring, streamed)
    for fetch in ring.occupied.values():
        raise _broken(fetch, "is never released")


def _fetch(node: fx.Node, ring: _Ring) -> None:
    _, _, buffer = node.args
    assert isinstance(buffer, int)
    if any(source.op != "placeholder" for source in node.all_input_nodes):
        raise _broken(node, "fetches what is not in host memory")
    if not 0 <= buffer < ring.depth:
        raise _broken(node, f"asks for buffer {buffer} of {ring.depth}")
    if buffer in ring.occupied:
        raise _broken(node, f"overwrites buffer {buffer} while {ring.occupied[buffer].name} holds it")
    ring.occupied[buffer] = node


def _wait(node: fx.Node, ring: _Ring) -> None:
    fetch = _whole_fetch(node)
    if fetch not in ring.occupied.values():
        raise _broken(node, f"waits for {fetch.name}, which is not under way")
    if fetch in ring.ready:
        raise _broken(node, f"waits for {fetch.name} a second time")
    ring.ready.add(fetch)


def _release(node: fx.Node, ring: _Ring) -> None:
    fetch = _whole_fetch(node)
    if fetch not in ring.ready or fetch in ring.released:
        raise _broken(node, f"releases {fetch.name}, which is not ready")
    ring.released.add(fetch)
    ring.occupied = {buffer: f for buffer, f in ring.occupied.items() if f is not fetch}


def _use(node: fx.Node, ring: _Ring, streamed: frozenset[str]) -> None:
    for source in node.all_input_nodes:
        if node.op == "call_module" and source.meta.get("parameter") in streamed:
            raise _broken(node, f"reads {source.name} from host memory")
    for fetch in _fetches(node):
        if fetch not in ring.ready:
            raise _broken(node, f"uses {fetch.name} before it was waited for")
        if fetch in ring.released:
            raise _broken(node, f"uses {fetch.name} after its release")


def _fetches(node: fx.Node) -> Iterator[fx.Node]:
    """The fetches that a node reads copies of."""
    for source in node.all_input_nodes:
        origin = source.all_input_nodes[0] if source.target is operator.getitem else source
        if origin.target is ops.fetch:
            yield origin


def _whole_fetch(node: fx.Node) -> fx.Node:
    """The one fetch whose copies, all of them, a wait or a release names."""
    fetches = set(_fetches(node))
    if len(fetches) != 1:
        raise _broken(node, "names the copies of no fetch, or of several")
    (fetch,) = fetches
    if len(set(node.all_input_nodes)) != len(fetch.all_input_nodes):
        raise _broken(node, f"does not name all copies of {fetch.name}")
    return fetch


def _broken(node: fx.Node, rule: str) -> VerificationError:
    return VerificationError(f"stream node check: {node.name} {rule}")
