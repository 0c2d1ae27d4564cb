"""Predicts how long a step that covers all parameters takes: replays its program against the clock.

Compute, updates beside it, what comes to the device and what leaves it: each does one thing after another, and they
wait for each other as the engines have them wait (`copies.engines`, `copies.states.ring`). So the clock sees what sums
of times (`predict.step_time`, by which plans are searched) do not: compute that waits for a value behind states that
were asked for before it, for the updates of the region before, or for a buffer that is still going out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor, fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.sizes import Sizes
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.policy import LinkUse, Policy, StepTimes
from chunkft_fx.predict.step_memory import outputs_nbytes
from chunkft_fx.program.program import Program, RegionCall

# The second step begins with what the first has left behind: copies under way, and buffers in use.
STEPS = 2


def clocked_step(
    program: Program, policy: Policy, times: StepTimes, parameters: Mapping[str, Tensor], sizes: Sizes
) -> LinkUse:
    """What a step of this program takes; ``times`` are those of a step, ``sizes`` those of a micro-batch."""
    each = times.times(1 / policy.micro_batches)
    clock = _Clock(program, policy, each, parameters, sizes)
    began = 0.0
    for _ in range(STEPS):
        began = clock.compute
        clock.run_step()
    still = _Clock(program, policy, replace(each, state_us_per_byte=0.0), parameters, sizes)
    still.run_step()
    moved, backward = clock.moved, clock.busy_backward
    hides_from = max(moved[True, True], moved[False, True]) / backward if policy.in_backward and backward else 0.0
    return LinkUse(
        step_us=clock.compute - began,
        still_us=still.compute,
        incoming_us=moved[True, False] + moved[True, True],
        outgoing_us=moved[False, False] + moved[False, True],
        hides_from=hides_from,
    )


@dataclass
class _Clock:
    """When each of the four is free again, in microseconds."""

    program: Program
    policy: Policy
    times: StepTimes
    parameters: Mapping[str, Tensor]
    sizes: Sizes
    compute: float = 0.0
    updates: float = 0.0
    incoming: float = 0.0
    outgoing: float = 0.0
    group: int | None = None
    copied: dict[fx.Node, float] = field(default_factory=dict)  # by fetch or offload, its end
    came: dict[int, float] = field(default_factory=dict)  # by piece
    left: dict[int, float] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)  # by piece, its buffer
    emptied: dict[int, float] = field(default_factory=dict)  # by buffer

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
        self.busy_backward = 0.0
        self.moved = dict.fromkeys(product((True, False), repeat=2), 0.0)  # by whether it came, and in the backward
        self.is_backward = False
        for node in self.program.graph.nodes:
            if node.op == "call_module":
                self._call(self.program.module.get_submodule(str(node.target)))
            elif node.target in self.handlers:
                self.handlers[node.target](node)
        self.compute, self.group = max(self.compute, self.updates), None
        if not self.policy.in_backward:
            self._step()

    def _call(self, call: Any) -> None:
        assert isinstance(call, RegionCall)
        i, times = call.region.index, self.times
        us = times.forward_us[i]
        if call.is_backward:
            again = times.recompute_us[i] if i < self.policy.save_from else 0.0
            us = times.backward_us[i] + times.gradients_us[i] + again
            self.busy_backward += us
        self.is_backward = call.is_backward
        self.compute += us

    def _come(self, ready: float, us: float) -> float:
        self.moved[True, self.is_backward] += us
        self.incoming = max(self.incoming, ready) + us
        return self.incoming

    def _go(self, ready: float, us: float) -> float:
        self.moved[False, self.is_backward] += us
        self.outgoing = max(self.outgoing, ready) + us
        return self.outgoing

    def _fetch(self, node: fx.Node) -> None:
        self.copied[node] = self._come(self.compute, self._moving_us(node))

    def _offload(self, node: fx.Node) -> None:
        self.copied[node] = self._go(self.compute, self._moving_us(node))

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
            nbytes = self._weights_nbytes(self.policy.pieces[_piece(node)])
            self._go(self.compute, nbytes * self.times.state_us_per_byte)

    def _fetch_states(self, piece: int, more: float = 0.0) -> None:
        buffer = self.held[piece] = self.free.pop(0)
        free = max(self.emptied.get(buffer, 0.0), self.left.get(piece, 0.0))
        self.came[piece] = self._come(free, self._piece_us(piece) + more)

    def _update(self, node: fx.Node) -> None:
        if node.meta["group"] != self.group:
            self.group, self.compute = node.meta["group"], max(self.compute, self.updates)
        piece = _piece(node)
        self.updates = max(self.updates, self.compute, self.came[piece]) + self._update_us(piece)

    def _write_states(self, piece: int, done: float) -> None:
        buffer = self.held.pop(piece)
        self.left[piece] = self.emptied[buffer] = self._go(done, self._piece_us(piece))
        self.free.append(buffer)

    def _step(self) -> None:
        """All pieces one behind the other, with gradients that come back."""
        waits = self.policy.host_gradients
        # nothing is fetched before the step is called, and gradients have left by then
        self.incoming = max(self.incoming, self.compute, self.outgoing if waits else 0.0)
        depth, count = self.policy.pieces.depth, len(self.policy.pieces)
        back = [self._weights_nbytes(p) * self.times.state_us_per_byte * waits for p in self.policy.pieces]
        for piece in range(min(depth, count)):
            self._fetch_states(piece, back[piece])
        for piece in range(count):
            self.compute = max(self.compute, self.came[piece]) + self._update_us(piece)
            self._write_states(piece, self.compute)
            if piece + depth < count:
                self._fetch_states(piece + depth, back[piece + depth])
        self.updates = self.compute

    def _moving_us(self, node: fx.Node) -> float:
        values: Any = node.args[0]
        return sum(map(self._nbytes, values)) * self.times.state_us_per_byte

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

    def _update_us(self, piece: int) -> float:
        return self.policy.pieces[piece].numel * self.times.update_us_per_element

    def _piece_us(self, piece: int) -> float:
        """The way of a piece's states, and of its weights that stay in host memory."""
        chunk = self.policy.pieces[piece]
        stay = self._weights_nbytes(chunk) - self._weights_nbytes(chunk, self.policy.streamed)
        return (chunk.nbytes - stay) * self.times.state_us_per_byte

    def _weights_nbytes(self, chunk: Chunk, among: frozenset[str] | None = None) -> int:
        found = [(s, self.parameters[s.name]) for s in chunk.slices if among is None or s.name in among]
        return sum(p.nbytes // s.size * s.length for s, p in found)


def _piece(node: fx.Node) -> int:
    number: Any = node.args[0] if isinstance(node.args[0], int) else node.args[1]
    return int(number)
