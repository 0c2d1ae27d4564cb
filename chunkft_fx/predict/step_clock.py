"""Predicts how long a step that covers all parameters takes: replays its program against the clock.

Compute, updates beside it, what comes to the device and what leaves it: each does one thing after another, and they
wait for each other as the engines have them wait (`copies.engines`, `copies.states.ring`). So the clock sees what sums
of times (`predict.step_time`, by which plans are searched) do not: compute that waits for a value behind states that
were asked for before it, for the updates of the region before, or for a buffer that is still going out. `spans` tells
when each of them does what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor, fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.sizes import Sizes
from chunkft_fx.plan.pieces import moving_nbytes, weights_nbytes
from chunkft_fx.plan.policy import LinkUse, Policy, StepTimes
from chunkft_fx.predict.step_memory import moment_label, outputs_nbytes
from chunkft_fx.program.program import Program, RegionCall

# The second step begins with what the first has left behind: copies under way, and buffers in use.
STEPS = 2
# What works beside each other in a step.
COMPUTE, UPDATES, INCOMING, OUTGOING = LANES = ("compute", "updates", "to the device", "to the host")


@dataclass(frozen=True)
class Span:
    """One thing that is done on one of the `LANES`, in microseconds from the beginning of the step.

    ``nbytes`` are those that a copy moves. A copy may end behind its step, or begin before it, while the step before
    ends: its first microseconds are negative then.
    """

    lane: str
    what: str
    begin_us: float
    end_us: float
    nbytes: int = 0


def clocked_step(
    program: Program, policy: Policy, times: StepTimes, parameters: Mapping[str, Tensor], sizes: Sizes
) -> LinkUse:
    """What a step of this program takes; ``times`` are those of a step, ``sizes`` those of a micro-batch."""
    each = times.times(1 / policy.micro_batches)
    clock = _replayed(program, policy, each, parameters, sizes)
    still = _Clock(program, policy, replace(each, state_us_per_byte=0.0), parameters, sizes)
    still.run_step()
    moved, per_byte, backward = clock.moved, each.state_us_per_byte, clock.busy_backward
    incoming, outgoing = (moved[comes, False] + moved[comes, True] for comes in (True, False))
    in_backward = max(moved[True, True], moved[False, True]) * per_byte
    return LinkUse(
        step_us=clock.compute - clock.began,
        still_us=still.compute,
        incoming_us=incoming * per_byte,
        outgoing_us=outgoing * per_byte,
        incoming_nbytes=incoming,
        outgoing_nbytes=outgoing,
        hides_from=in_backward / backward if policy.in_backward and backward else 0.0,
    )


def spans(
    program: Program, policy: Policy, times: StepTimes, parameters: Mapping[str, Tensor], sizes: Sizes
) -> tuple[Span, ...]:
    """All that such a step does, by when it begins; for the same arguments as `clocked_step`."""
    clock = _replayed(program, policy, times.times(1 / policy.micro_batches), parameters, sizes)
    moved = (replace(s, begin_us=s.begin_us - clock.began, end_us=s.end_us - clock.began) for s in clock.spans)
    return tuple(sorted(moved, key=lambda span: (span.begin_us, LANES.index(span.lane))))


def _replayed(
    program: Program, policy: Policy, each: StepTimes, parameters: Mapping[str, Tensor], sizes: Sizes
) -> _Clock:
    """A clock behind a step that was not the first one."""
    clock = _Clock(program, policy, each, parameters, sizes)
    for _ in range(STEPS):
        clock.run_step()
    return clock


@dataclass
class _Clock:
    """When each of the four is free again, in microseconds; of the step that ran last, when it began and all it did."""

    program: Program
    policy: Policy
    times: StepTimes
    parameters: Mapping[str, Tensor]
    sizes: Sizes
    compute: float = 0.0
    updates: float = 0.0
    incoming: float = 0.0
    outgoing: float = 0.0
    began: float = 0.0
    spans: list[Span] = field(default_factory=list)
    copies: list[tuple[float, float]] = field(default_factory=list)  # those that may be under way, from when to when
    group: int | None = None
    copied: dict[fx.Node, float] = field(default_factory=dict)  # by fetch or offload, its end
    came: dict[int, float] = field(default_factory=dict)  # by piece
    left: dict[int, float] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)  # by piece, its buffer
    emptied: dict[int, float] = field(default_factory=dict)  # by buffer
    to_update: list[int] = field(default_factory=list)  # pieces of the optimizer's step that are still to be updated

    def __post_init__(self) -> None:
        self.free = list(range(self.policy.pieces.depth))
        self.handlers = {
            ops.fetch: self._fetch,
            ops.wait: self._wait,
            ops.release: self._wait,
            ops.offload: self._offload,
            ops.keep: self._keep,
        }
        if self.policy.in_backward:
            self.handlers |= {
                ops.fetch_states: lambda node: self._fetch_states(_piece(node)),
                ops.update: self._update,
                ops.write_states: lambda node: self._write_states(_piece(node), self.updates),
            }

    def run_step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.began, self.spans, self.busy_backward = self.compute, [], 0.0
        self.moved = dict.fromkeys(product((True, False), repeat=2), 0)  # bytes, by whether they came, in the backward
        self.is_backward = False
        for node in self.program.graph.nodes:
            if node.op == "call_module":
                self._call(node, self.program.module.get_submodule(str(node.target)))
            elif node.target in self.handlers:
                self.handlers[node.target](node)
        self.compute, self.group = max(self.compute, self.updates), None
        if not self.policy.in_backward:
            self._step()

    def _call(self, node: fx.Node, call: Any) -> None:
        assert isinstance(call, RegionCall)
        if self.to_update:
            self._meet_updates(node, call)
        i, times = call.region.index, self.times
        us = times.forward_us[i]
        if call.is_backward:
            again = times.recompute_us[i] if i < self.policy.save_from else 0.0
            us = times.backward_us[i] + times.gradients_us[i] + again
            self.busy_backward += us
        elif i == len(times.forward_us) - 1:  # the head's, split into blocks
            us += dict(times.split_us)[self.policy.head_split]
        self.is_backward = call.is_backward
        us += self._slowed_us(us)
        self.compute = self._span(COMPUTE, moment_label(call.region, call.is_backward), self.compute, us)

    def _slowed_us(self, us: float) -> float:
        """What copies that are under way add to a call that begins now; those of one way alone add half as much."""
        begin, end = self.compute, self.compute + us
        self.copies = [copy for copy in self.copies if copy[1] > begin]
        beside = sum(max(0.0, min(until, end) - max(since, begin)) for since, until in self.copies)
        return (self.times.slowed_by_copies - 1) * beside / 2

    def _span(self, lane: str, what: str, begin: float, us: float, nbytes: int = 0) -> float:
        """Note what is done; returns when it ends."""
        self.spans.append(Span(lane, what, begin, begin + us, nbytes))
        return begin + us

    def _come(self, what: str, ready: float, nbytes: int) -> float:
        self.moved[True, self.is_backward] += nbytes
        begin, us = max(self.incoming, ready), nbytes * self.times.state_us_per_byte
        self.incoming = self._span(INCOMING, what, begin, us, nbytes)
        self.copies.append((begin, self.incoming))
        return self.incoming

    def _go(self, what: str, ready: float, nbytes: int) -> float:
        self.moved[False, self.is_backward] += nbytes
        begin, us = max(self.outgoing, ready), nbytes * self.times.state_us_per_byte
        self.outgoing = self._span(OUTGOING, what, begin, us, nbytes)
        self.copies.append((begin, self.outgoing))
        return self.outgoing

    def _fetch(self, node: fx.Node) -> None:
        self.copied[node] = self._come(_copied(node), self.compute, self._moving_nbytes(node))

    def _offload(self, node: fx.Node) -> None:
        self.copied[node] = self._go(_copied(node), self.compute, self._moving_nbytes(node))

    def _wait(self, node: fx.Node) -> None:
        """A wait for what was fetched, or the release of a value that is on its way out; a buffer's is for nothing."""
        values: Any = node.args[0]
        if node.target is ops.wait:
            self.compute = max(self.compute, self.copied[values[0].args[0]])
            return
        for offload in (u for u in values[0].users if u.target is ops.offload):
            self.compute = max(self.compute, self.copied[offload])

    def _keep(self, node: fx.Node) -> None:
        """Gradients of a piece leave, if they wait in host memory."""
        if self.policy.host_gradients:
            piece = _piece(node)
            self._go(
                f"gradients of piece {piece}", self.compute, weights_nbytes(self.policy.pieces[piece], self.parameters)
            )

    def _fetch_states(self, piece: int, gradients: int = 0) -> None:
        buffer = self.held[piece] = self.free.pop(0)
        free = max(self.emptied.get(buffer, 0.0), self.left.get(piece, 0.0))
        what = f"states and gradients of piece {piece}" if gradients else _states(piece)
        self.came[piece] = self._come(what, free, self._piece_nbytes(piece) + gradients)

    def _update(self, node: fx.Node) -> None:
        if node.meta["group"] != self.group:
            self.group, self.compute = node.meta["group"], max(self.compute, self.updates)
        piece = _piece(node)
        self.updates = self._updated(piece, max(self.updates, self.compute, self.came[piece]))

    def _updated(self, piece: int, begin: float) -> float:
        us = self.policy.pieces[piece].numel * self.times.update_us_per_element / self.policy.ranks
        us += weights_nbytes(self.policy.pieces[piece], self.parameters) * self.times.ranks_us_per_byte
        return self._span(UPDATES, f"update of piece {piece}", begin, us)

    def _write_states(self, piece: int, done: float) -> None:
        buffer = self.held.pop(piece)
        self.left[piece] = self.emptied[buffer] = self._go(_states(piece), done, self._piece_nbytes(piece))
        self.free.append(buffer)

    def _step(self) -> None:
        """All pieces one behind the other, with gradients that come back; late ones are left to the next forward."""
        policy = self.policy
        # nothing is fetched before the step is called, and gradients have left by then
        self.incoming = max(self.incoming, self.compute, self.outgoing if policy.host_gradients else 0.0)
        self.updates, self.to_update = self.compute, list(range(len(policy.pieces)))
        for piece in self.to_update[: policy.pieces.depth]:
            self._fetch_states(piece, self._returning_nbytes(piece))
        if not policy.updates_late:
            self._await_updates(len(self.to_update))

    def _await_updates(self, count: int) -> None:
        """Compute goes on behind so many of the updates that are left."""
        for _ in range(count):
            self._update_next()
        if count:
            self.compute = max(self.compute, self.updates)

    def _update_next(self) -> None:
        piece, *self.to_update = self.to_update
        self.updates = self._updated(piece, max(self.updates, self.came[piece]))
        self._write_states(piece, self.updates)
        behind = piece + self.policy.pieces.depth
        if behind < len(self.policy.pieces):
            self._fetch_states(behind, self._returning_nbytes(behind))

    def _meet_updates(self, node: fx.Node, call: RegionCall) -> None:
        """Late updates as far as compute has come, and those of the weights that a call reads: it waits for them.

        Copies of several links share the way out. Here they take it in the order in which they could begin.
        """
        while self.to_update and max(self.updates, self.came[self.to_update[0]]) < self.compute:
            self._update_next()
        read = {source.meta.get("parameter") for source in node.all_input_nodes}
        pieces = self.policy.pieces
        met = [i for i, piece in enumerate(self.to_update) if any(s.name in read for s in pieces[piece].slices)]
        self._await_updates(len(self.to_update) if call.is_backward else max(met, default=-1) + 1)

    def _returning_nbytes(self, piece: int) -> int:
        """Bytes of a piece's gradients that come back from host memory."""
        return weights_nbytes(self.policy.pieces[piece], self.parameters) * self.policy.host_gradients

    def _moving_nbytes(self, node: fx.Node) -> int:
        values: Any = node.args[0]
        return sum(map(self._nbytes, values))

    def _nbytes(self, node: fx.Node) -> int:
        name = node.meta.get("parameter")
        if name is not None:
            return self.parameters[name].nbytes
        if "val" in node.meta:
            return self.sizes.nbytes(node.meta["val"])
        source, index = node.args
        assert isinstance(source, fx.Node), "a value that comes and goes is an input, or an item of what made it"
        if source.op == "call_module":
            call: Any = self.program.module.get_submodule(str(source.target))
            return outputs_nbytes(call.variant, call.is_backward, self.sizes)[int(str(index))]
        values: Any = source.args[0]
        return self._nbytes(values[index])

    def _piece_nbytes(self, piece: int) -> int:
        return moving_nbytes(self.policy.pieces[piece], self.parameters, self.policy.streamed, self.policy.ranks)


def _piece(node: fx.Node) -> int:
    number: Any = node.args[0] if isinstance(node.args[0], int) else node.args[1]
    return int(number)


def _states(piece: int) -> str:
    return f"states of piece {piece}"


def _copied(node: fx.Node) -> str:
    """What a fetch or an offload moves."""
    values: Any = node.args[0]
    names = [value.meta["parameter"] for value in values if value.meta.get("parameter") is not None]
    return f"weights {', '.join(names)}" if names else f"{len(values)} saved value{'s' * (len(values) > 1)}"
