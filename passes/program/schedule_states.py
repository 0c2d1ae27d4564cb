"""schedule_states: copy optimizer states to the device where the link would be idle.

Contract: only ``admit`` nodes are added, each right before a region call, with shares that rise to 1. Values do not
change. The states of the active chunk are needed at the end of the step; brought in all at once at its beginning,
they would stand in the way of the weights that the first regions wait for.

Terms: the *window* of a region call is the time that it is predicted to take, its *idle* part that in which no fetch
begun before is under way. States get `HIDDEN_SHARE` of every idle part from the first on, or as much more of each as
all of them need.

Before::

    fetch 0, fetch 1, wait 0, call 0, release 0, fetch 2, wait 1, call 1, ...

After (call 0 takes longer than fetch 1, call 1 as long as fetch 2)::

    fetch 0, fetch 1, wait 0, admit(0.3), call 0, release 0, fetch 2, wait 1, call 1, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import PARTS
from chunkft_fx.plan.policy import HIDDEN_SHARE, StepTimes

# Windows that add less than this wait for others: idle time that only rounding made, and less than one copy moves.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class ScheduleStates:
    """Spread ``nbytes`` of states over a step of these times; regions below ``save_from`` recompute in backward."""

    times: StepTimes
    save_from: int
    nbytes: int
    name: str = "schedule_states"

    def __call__(self, module: fx.GraphModule) -> int:
        """Rewrite a program in place; returns the number of nodes added."""
        shares = self._shares(list(self._windows(module)))
        for call, share in shares:
            with module.graph.inserting_before(call):
                admit = module.graph.call_function(ops.admit, (share,))
            admit.meta["part"] = PARTS[_is_backward(module, call)]
        return len(shares)

    def _shares(self, windows: list[tuple[fx.Node, float]]) -> list[tuple[fx.Node, float]]:
        """The calls under which states are copied, each with the share that may be there by its end; the last has 1."""
        needed = self.nbytes * self.times.state_us_per_byte
        if not windows or not needed:
            return []
        idle = sum(us for _, us in windows)
        if not idle:
            return [(windows[0][0], 1.0)]
        used = max(HIDDEN_SHARE, needed / idle)
        shares: list[tuple[fx.Node, float]] = []
        came = last = 0.0
        for call, us in windows:
            came = min(came + us * used / needed, 1.0)
            if came - last >= LEAST_SHARE:
                shares.append((call, came))
                last = came
        return [*shares[:-1], (shares[-1][0], 1.0)]

    def _windows(self, module: fx.GraphModule) -> Iterator[tuple[fx.Node, float]]:
        """The region calls in order, each with the idle microseconds of its window."""
        now = link = 0.0
        ready: dict[fx.Node, float] = {}
        for node in module.graph.nodes:
            if node.target is ops.fetch:
                link = ready[node] = max(link, now) + self._fetch_us(node)
            elif node.target is ops.wait:
                now = max(now, ready[node.all_input_nodes[0].all_input_nodes[0]])
            elif node.op == "call_module":
                end = now + self._call_us(module, node)
                yield node, max(0.0, end - max(now, link))
                now = end

    def _call_us(self, module: fx.GraphModule, call: fx.Node) -> float:
        region: int = call.meta["region"]
        if not _is_backward(module, call):
            return self.times.forward_us[region]
        return self.times.backward_us[region] + (self.times.recompute_us[region] if region < self.save_from else 0.0)

    def _fetch_us(self, fetch: fx.Node) -> float:
        """How long a fetch takes, by the region that it is for."""
        items = list(fetch.users)
        region: int = next(user.meta["region"] for item in items for user in item.users if user.op == "call_module")
        is_saved = fetch.args[2] == ops.FRESH
        return self.times.offload_us[region] if is_saved else self.times.fetch_us[region]


def _is_backward(module: fx.GraphModule, call: fx.Node) -> bool:
    return bool(module.get_submodule(str(call.target)).is_backward)
