"""Predicts how long a step takes: regions one after another, copies between host and device beside them.

Compute runs region by region. A streamed weight must have arrived before its region runs, and its buffer is filled
again once the region is done; states of the next chunk and offloaded activations share the link. A step takes as long
as the slower of both sides. Times of regions come from the cost model (`predict.predictor`); here they are put
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkft_fx.plan.policy import HIDDEN_SHARE, Policy, StepTimes

# Regions at both ends that are left out, as far as there are enough others, when streamed ones are placed: forward and
# backward begin there, with nothing that a fetch could hide under. Links that never rest do better without.
MARGINS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Work:
    """What one chunk adds to a step: its lowest region, microseconds of gradients and update, and of copying states."""

    lowest: int
    gradients_us: float
    states_us: float


@dataclass(frozen=True)
class BareSteps:
    """Steps without a chunk's own work, by the lowest region of backward: microseconds of compute and of the link.

    The last is a step without a backward, as of a chunk of which no region reads a weight.
    """

    compute_us: NDArray[np.float64]
    link_us: NDArray[np.float64]


def bare_steps(times: StepTimes, policy: Policy, streamed: frozenset[int], depth: int) -> BareSteps:
    """The two sides of a step; ``streamed`` are the regions whose weights are fetched for each use."""
    last = len(times.forward_us)
    fetch = [times.fetch_us[i] if i in streamed else 0.0 for i in range(last)]
    again = [times.recompute_us[i] if i < policy.save_from else 0.0 for i in range(last)]
    kept = [times.offload_us[i] if i < policy.offload_below else 0.0 for i in range(last)]
    forward = _pipeline(times.forward_us, fetch, depth)[-1]
    order = range(last - 1, -1, -1)
    backward = _pipeline([times.backward_us[i] + again[i] for i in order], [fetch[i] for i in order], depth)
    moved = np.cumsum(np.add(fetch, kept)[::-1])[::-1]  # from each region up
    more = dict(times.split_us)[policy.head_split]
    compute = forward + more + np.array([0.0, *backward])[::-1]
    return BareSteps(compute, sum(fetch) + np.append(moved, 0.0))


def streamed_regions(regions: int, count: int, times: StepTimes | None, depth: int) -> tuple[int, ...]:
    """Which ``count`` regions stream their weights: spread evenly, so that fetches have compute to hide under.

    Where times are known a margin is left free at both ends, that with which steps wait least.
    """
    places = [_spread(regions, count, margin) for margin in MARGINS]
    if times is None:
        return places[0]
    bare = [bare_steps(times, Policy(), frozenset(place), depth) for place in places]
    waits = [float(np.maximum(b.compute_us, b.link_us)[:-1].mean()) for b in bare]
    return places[waits.index(min(waits))]


def step_us(bare: BareSteps, work: Work) -> float:
    """Microseconds of one step on a chunk."""
    compute = bare.compute_us[work.lowest] + work.gradients_us
    return float(max(compute, bare.link_us[work.lowest] + work.states_us / HIDDEN_SHARE))


def covering_step_us(times: StepTimes, policy: Policy, streamed: frozenset[int], work: Work) -> float:
    """Microseconds of a step that covers all parameters, of which ``work`` is that of them all.

    Within the backward states move under its compute, beside its share of the weights that are fetched; those that the
    ring has room for come in while the forward runs. Where weights or saved values come in between, compute waits for
    them behind states, and only a part of the link's time is hidden, as in `step_us`. At the step they move when the
    backward is over, under nothing but the update itself; gradients that wait in host memory leave under the backward,
    the way that weights do not take, and come back with the states; where updates may run late, beside the
    next forward.
    """
    bare = bare_steps(times, policy, streamed, policy.depth)
    compute, link = float(bare.compute_us[0]) + work.gradients_us, float(bare.link_us[0])
    forward = sum(times.forward_us)
    if policy.host_gradients:
        states = work.states_us + times.return_us
        behind = max(states - forward, 0.0) if policy.late and not streamed else states
        return max(compute, link, forward + times.leave_us) + behind
    if not policy.in_backward:
        return max(compute, link) + work.states_us
    fetched = sum(times.fetch_us[i] for i in streamed)
    forward = max(forward, fetched)
    others = link - fetched
    states = work.states_us / HIDDEN_SHARE if others else work.states_us
    early = min(states * policy.pieces.depth / len(policy.pieces), forward - fetched)
    return max(forward + max(compute - forward, others + states - early), compute)


@dataclass(frozen=True)
class SweepWork:
    """The work of all chunks of a sweep, column by column."""

    lowest: NDArray[np.int64]
    gradients_us: NDArray[np.float64]
    states_us: NDArray[np.float64]

    @classmethod
    def of(cls, works: Sequence[Work]) -> SweepWork:
        """The columns of one work a chunk, in the order of the sweep."""
        columns = ([w.lowest for w in works], [w.gradients_us for w in works], [w.states_us for w in works])
        return cls(*(np.array(c) for c in columns))

    def steps_us(self, bare: BareSteps) -> NDArray[np.float64]:
        """`step_us` of every chunk."""
        compute, link = bare.compute_us[self.lowest], bare.link_us[self.lowest]
        return np.maximum(compute + self.gradients_us, link + self.states_us / HIDDEN_SHARE)


def sweep_cost(steps_us: NDArray[np.float64]) -> float:
    """The time of a sweep, which teaches about as much however many chunks it has: what a plan minimises."""
    return float(steps_us.sum())


def least_cost(times: StepTimes, state_nbytes: int, count: int) -> float:
    """No plan of ``count`` chunks costs less: everything is resident and saved, and chunks are equal."""
    regions = len(times.forward_us)
    floor = sum(times.forward_us) + sum(us * (i + 1) for i, us in enumerate(times.backward_us)) / regions
    states = state_nbytes * times.state_us_per_byte / HIDDEN_SHARE
    # cuts at borders let backward end a region earlier: two regions of slack keep this a bound
    slack = max(times.backward_us) * min(2.0, regions / 2)
    return max(count * (floor - slack) + sum(times.gradients_us), states)


def _spread(regions: int, count: int, margin: int) -> tuple[int, ...]:
    """``count`` regions at even distances, and up to ``margin`` of the others before and behind them."""
    others = regions - count
    before, behind = min(margin, -(-others // 2)), min(margin, others // 2)
    inner = regions - before - behind
    return tuple(before + (2 * i + 1) * inner // (2 * count) for i in range(count))


def _pipeline(compute_us: Sequence[float], fetch_us: Sequence[float], depth: int) -> list[float]:
    """When each region ends, one after another, each after its fetch; ``depth`` buffers are filled in order."""
    now = link = 0.0
    free = [0.0] * depth
    ends: list[float] = []
    for compute, fetch in zip(compute_us, fetch_us, strict=True):
        if fetch:
            link = max(link, free.pop(0)) + fetch
            now = max(now, link)
        now += compute
        if fetch:
            free.append(now)
        ends.append(now)
    return ends
