"""Checks that a program's fetches are waited for, used in time, and never overwritten.

It walks a program once. Every buffer of the ring goes through ``free → filling → ready → free``; every offloaded value
through ``on the device → going → released → coming → ready``. What it proves holds for any timing of the copies:
nothing between a fetch and its wait reads what it fills, nothing between a wait and its release fills a buffer, and
nothing uses a value behind its release.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import PARTS
from chunkft_fx.plan.policy import Policy


@dataclass
class _State:
    """Where the walk is, which fetches are under way or ready, and where offloaded values are."""

    policy: Policy
    part: str = PARTS[0]
    occupied: dict[int, fx.Node] = field(default_factory=dict)  # the fetch in each buffer of the ring
    begun: set[fx.Node] = field(default_factory=set)  # fetches
    ready: set[fx.Node] = field(default_factory=set)  # fetches
    released: set[fx.Node] = field(default_factory=set)  # fetches through the ring
    made: set[fx.Node] = field(default_factory=set)  # results of region calls
    going: dict[fx.Node, fx.Node] = field(default_factory=dict)  # offloaded values, with their offload
    gone: set[fx.Node] = field(default_factory=set)  # offloaded values that were released
    fetched: set[fx.Node] = field(default_factory=set)  # host copies
    admitted: float = 0.0  # the share of the optimizer states that may have come in
    staged: set[int] = field(default_factory=set)  # pieces that hold a buffer of the ring of states
    updated: set[int] = field(default_factory=set)  # pieces
    changed: set[str] = field(default_factory=set)  # parameters that were updated
    complete: set[str] = field(default_factory=set)  # parameters whose gradients were taken


def verify_streams(module: fx.GraphModule, policy: Policy) -> None:
    """Check a program's stream nodes; raises `VerificationError` that names the node and the broken rule.

    The rules: all of a fetch's copies are waited for together, once, before their first use; no region call reads a
    streamed weight, or an offloaded value, from the host.
    Through the ring: a fetch brings weights into a free buffer of ``policy.depth``; every use lies between the wait and
    the release; each fetch is released once, within its own part of the step.
    Saved values: an offload takes results of forward calls, each once; each is released in forward, behind its offload,
    and not used after that; a fetch of them belongs to backward, comes after that release, which is where the host copy
    is complete, and brings each value at most once. Nothing else reads a host copy.
    Sums: gradients of backward calls are added to a sum that nothing else reads.
    States: shares that are admitted rise, to 1 at most.
    Pieces: an update belongs to backward; the states of its piece were fetched before it and are written behind it, and
    at most ``policy.pieces.depth`` pieces are between the two. Behind it no call reads one of its weights, and no other
    gradient of them is made. A ``keep`` is held to the same, but leaves weights as they are.
    """
    state = _State(policy)
    for node in module.graph.nodes:
        if node.op == "call_module" and module.get_submodule(str(node.target)).is_backward:
            _enter_backward(state)
        if node.target is ops.offload:
            _offload(node, state)
        elif node.target is ops.fetch:
            _fetch(node, state)
        elif node.target is ops.wait:
            _wait(node, state)
        elif node.target is ops.release and _is_of_fetch(node):
            _release(node, state)
        elif node.target is ops.release:
            _let_go(node, state)
        elif node.target is ops.admit:
            _admit(node, state)
        elif node.target in ops.PIECE_NODES:
            _piece(node, state)
        elif node.target is operator.getitem:
            _item(node, state)
        elif node.target in ops.SUMS:
            _add_up(node, state)
        elif node.op != "placeholder":
            _use(node, state)
    _enter_backward(state)
    for fetch in state.occupied.values():
        raise _broken(fetch, "is never released")
    for piece in state.staged:
        raise VerificationError(f"stream node check: the states of piece {piece} are fetched, and never written back")
    for fetch in state.begun - state.ready:
        raise _broken(fetch, "is never waited for")


def _enter_backward(state: _State) -> None:
    if state.part == PARTS[1]:
        return
    state.part = PARTS[1]
    late = [f for f in state.occupied.values() if f.meta.get("part") != state.part]
    if late:
        raise _broken(late[0], "holds its buffer beyond the forward part")
    for value, offload in state.going.items():
        if value not in state.gone:
            raise _broken(offload, f"holds {value.name} on the device beyond the forward part")


def _offload(node: fx.Node, state: _State) -> None:
    if state.part != PARTS[0] or node.meta.get("part") != PARTS[0]:
        raise _broken(node, "does not belong to the forward part")
    for value in node.all_input_nodes:
        if value not in state.made:
            raise _broken(node, f"offloads {value.name}, which no region call made")
        if value in state.going:
            raise _broken(node, f"offloads {value.name} a second time")
        state.going[value] = node


def _let_go(node: fx.Node, state: _State) -> None:
    for value in node.all_input_nodes:
        if value not in state.going:
            raise _broken(node, f"releases {value.name}, which was not offloaded")
        if value in state.gone:
            raise _broken(node, f"releases {value.name} a second time")
        state.gone.add(value)
    if len({state.going[value] for value in node.all_input_nodes}) != 1:
        raise _broken(node, "releases values of several offloads")


def _fetch(node: fx.Node, state: _State) -> None:
    buffer: Any = node.args[2]
    state.begun.add(node)
    if buffer == ops.FRESH:
        _fetch_saved(node, state)
        return
    if any(source.op != "placeholder" for source in node.all_input_nodes):
        raise _broken(node, "fetches what is not in host memory")
    if not 0 <= buffer < state.policy.depth:
        raise _broken(node, f"asks for buffer {buffer} of {state.policy.depth}")
    if buffer in state.occupied:
        raise _broken(node, f"overwrites buffer {buffer} while {state.occupied[buffer].name} holds it")
    state.occupied[buffer] = node


def _fetch_saved(node: fx.Node, state: _State) -> None:
    if node.meta.get("part") != PARTS[1]:
        raise _broken(node, "does not belong to the backward part")
    for host in node.all_input_nodes:
        value = _offloaded(host)
        if value is None:
            raise _broken(node, f"fetches {host.name}, which was not offloaded")
        if value not in state.gone:
            raise _broken(node, f"reads {host.name} before {value.name} was released")
        if host in state.fetched:
            raise _broken(node, f"fetches {host.name} a second time")
        state.fetched.add(host)


def _wait(node: fx.Node, state: _State) -> None:
    fetch = _whole_fetch(node)
    if fetch not in state.begun or fetch in state.released:
        raise _broken(node, f"waits for {fetch.name}, which is not under way")
    if fetch in state.ready:
        raise _broken(node, f"waits for {fetch.name} a second time")
    state.ready.add(fetch)


def _release(node: fx.Node, state: _State) -> None:
    fetch = _whole_fetch(node)
    if fetch.args[2] == ops.FRESH:
        raise _broken(node, f"releases {fetch.name}, which holds no buffer")
    if fetch not in state.ready or fetch in state.released:
        raise _broken(node, f"releases {fetch.name}, which is not ready")
    state.released.add(fetch)
    state.occupied = {buffer: f for buffer, f in state.occupied.items() if f is not fetch}


def _admit(node: fx.Node, state: _State) -> None:
    share: Any = node.args[0]
    if not state.admitted < share <= 1.0:
        raise _broken(node, f"admits the share {share} of the states after {state.admitted}")
    state.admitted = share


def _piece(node: fx.Node, state: _State) -> None:
    piece: Any = node.args[-1]
    if node.meta.get("part") != PARTS[1]:
        raise _broken(node, "does not belong to the backward part")
    if node.target is ops.fetch_states:
        if piece in state.staged or piece in state.updated:
            raise _broken(node, f"fetches the states of piece {piece} a second time")
        if len(state.staged) == state.policy.pieces.depth:
            raise _broken(node, f"needs a buffer while {len(state.staged)} pieces hold all of them")
        state.staged.add(piece)
    elif piece not in state.staged:
        raise _broken(node, f"needs the states of piece {piece}, which are not there")
    elif node.target in ops.TAKERS:
        if piece in state.updated:
            raise _broken(node, f"updates piece {piece} a second time")
        state.updated.add(piece)
        state.complete |= set(node.meta["names"])
        if node.target is ops.update:
            state.changed |= set(node.meta["names"])
    else:
        if piece not in state.updated:
            raise _broken(node, f"writes the states of piece {piece} before its update")
        state.staged.remove(piece)


def _add_up(node: fx.Node, state: _State) -> None:
    if state.part != PARTS[1] or node.meta.get("part") != PARTS[1]:
        raise _broken(node, "does not belong to the backward part")
    for source in node.all_input_nodes:
        if source not in state.made:
            raise _broken(node, f"adds {source.name}, which no region call made")
        if len(source.users) > 1:
            raise _broken(node, f"adds to {source.name}, which others read")
    _made(node, state)


def _made(node: fx.Node, state: _State) -> None:
    if node.meta.get("gradient_of") in state.complete:
        raise _broken(node, f"is a gradient of {node.meta['gradient_of']} behind its update")
    state.made.add(node)


def _item(node: fx.Node, state: _State) -> None:
    if node.all_input_nodes[0].op == "call_module":
        _made(node, state)


def _use(node: fx.Node, state: _State) -> None:
    for source in node.all_input_nodes:
        if node.op == "call_module" and _weight_of(source) in state.changed:
            raise _broken(node, f"reads {_weight_of(source)} behind its update")
        if node.op == "call_module" and source.meta.get("parameter") in state.policy.streamed:
            raise _broken(node, f"reads {source.name} from host memory")
        if _offloaded(source) is not None:
            raise _broken(node, f"reads {source.name} from host memory")
        if source in state.gone:
            raise _broken(node, f"uses {source.name} after its release")
    for fetch in _fetches(node):
        if fetch not in state.ready:
            raise _broken(node, f"uses {fetch.name} before it was waited for")
        if fetch in state.released:
            raise _broken(node, f"uses {fetch.name} after its release")


def _weight_of(node: fx.Node) -> str | None:
    """The parameter that a node is, or is a copy of."""
    if node.target is operator.getitem and node.all_input_nodes[0].target is ops.fetch:
        index: Any = node.args[1]
        host: Any = node.all_input_nodes[0].args[0]
        node = host[index]
    name: str | None = node.meta.get("parameter")
    return name


def _is_of_fetch(release: fx.Node) -> bool:
    """Whether a release frees what a fetch filled, not the device memory of offloaded values."""
    return next(_fetches(release), None) is not None


def _offloaded(host: fx.Node) -> fx.Node | None:
    """The value whose host copy this is; None for anything else."""
    if host.target is not operator.getitem or host.all_input_nodes[0].target is not ops.offload:
        return None
    index: Any = host.args[1]
    values: Any = host.all_input_nodes[0].args[0]
    value: fx.Node = values[index]
    return value


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
