"""Decides how many buffers states pass through within the backward: a deep ring hides more, a small one leaves room."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from chunkft_fx.plan.pieces import DEPTHS
from chunkft_fx.plan.policy import LinkUse
from chunkft_fx.planning.choice import Fit
from chunkft_fx.planning.search import Search
from chunkft_fx.predict.fixed_memory import RING_OF_STATES

# A deeper ring has to save this share of a step. What it would take of the budget is of use otherwise: under a limit
# that leaves nothing free the allocator gives back pages between blocks, and waits for the device before it does.
NEARLY = 1 / 300
# What the clock tells of a step by a choice that a search found.
Clock = Callable[[Search, Fit], LinkUse | None]


def best_ring(search: Search, best: Fit, clock: Clock) -> tuple[Search, Fit]:
    """The best choice of all rings of states that are tried, and the search that found it; steps have to be timed.

    A deeper ring lets more states come in while the forward runs, when the link would rest; for its room more may have
    to be recomputed. What is gained and lost tells the clock, not the sums of times that each search goes by. At the
    optimizer's step pieces move one behind the other with nothing between: more buffers would stay empty.
    """

    def clocked_us(one: tuple[Search, Fit]) -> float:
        use = clock(*one)
        assert use is not None, "times are known"
        return use.step_us

    base = search.base
    found = [(search, _deepened(best, search))]
    for depth in (d for d in DEPTHS if base.pieces.depth < d <= len(base.pieces)):
        deeper = search.like(replace(base, pieces=replace(base.pieces, depth=depth)))
        fit = deeper.run()
        if fit is not None:
            found.append((deeper, _deepened(fit, deeper)))
    search, best = min(found, key=clocked_us)
    enough = clocked_us((search, best)) * (1 + NEARLY)
    depths = range(base.pieces.depth, best.choice.policy.pieces.depth)
    at = bisect_left(depths, True, key=lambda depth: clocked_us((search, _with_depth(best, search, depth))) <= enough)
    return search, _with_depth(best, search, base.pieces.depth + at)


def _deepened(best: Fit, search: Search) -> Fit:
    """The same choice with a ring of states as deep as the rest of the budget lets it be."""
    pieces = best.choice.policy.pieces
    deeper = pieces.deepened(search.budget - best.nbytes, best.terms.get(RING_OF_STATES, 0) // pieces.depth)
    return _with_depth(best, search, deeper.depth)


def _with_depth(best: Fit, search: Search, depth: int) -> Fit:
    pieces = best.choice.policy.pieces
    nbytes = best.terms.get(RING_OF_STATES, 0) // pieces.depth
    choice = replace(best.choice, policy=replace(best.choice.policy, pieces=replace(pieces, depth=depth)))
    return Fit(choice, best.terms | {RING_OF_STATES: depth * nbytes}, best.peak_at, *search.costs.cost(choice))
