"""Decides all that trades bytes for time, together.

A choice is a number of chunks, how many regions stream their weights and through how many buffers, and a `Policy`, of
which the borders and the split of the head are tried. What a choice needs is the fixed terms of its chunks and the
largest moment of its steps; `planning.costs` says what it costs. Choices do not depend on the budget, only which of
them fit does: so a larger budget never costs more. Where a step covers all parameters they are one chunk, which is
given, in the pieces of the policy that every choice is based on.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.cuts import ParameterSpec, Stream, cut, max_chunks
from chunkft_fx.plan.policy import DEPTH, Policy
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec
from chunkft_fx.plan.table import Considered
from chunkft_fx.planning.choice import Choice, Cost, Fit, Predicts, key_of
from chunkft_fx.planning.costs import BASE, ChoiceCosts
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.predict.step_time import least_cost

# Numbers of chunks that are tried where times are known; neighbours differ by a third at least.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
# More chunks than this save less than a thousandth of the states each; a 7B model has 1.7 million places to cut.
MOST_CHUNKS = 1024
# Ring depths tried: a third buffer evens out regions of unequal length.
DEPTHS = (DEPTH, DEPTH + 1)

LATER = "larger steps later in the sweep"


class Search:
    """Finds the cheapest choice that fits; ``considered`` tells of the others, with the bytes that they need."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[ParameterSpec],
        predictor: Predicts,
        budget: int,
        chunks: tuple[Chunk, ...] | None = None,
        spec: StateSpec = ASSUMED,
        base: Policy = BASE,
    ) -> None:
        self.base, self._model, self._spec = base, model, spec
        self.parameters, self.predictor, self.budget = parameters, predictor, budget
        self.given = chunks
        self.head = predictor.head()
        self.considered: list[Considered] = []
        self.smallest: Fit | None = None
        # by number of chunks and policy of the steps, what no step of a sweep exceeds, where that was looked at
        self._sweeps: dict[tuple[int, Policy], Moment] = {}
        # by number of chunks, or 0 for the smallest chunk there is, and what steps depend on
        self._moments: dict[tuple[int, int, int, int], Moment] = {}
        self.finest = chunks or cut(parameters, min(max_chunks(parameters), MOST_CHUNKS))
        self.times = predictor.times(self.finest[0])
        self.costs = ChoiceCosts(model, parameters, predictor, self.times, spec)
        self.regions = self.costs.regions
        # where cuts of many counts are compared, what every first chunk holds at least
        self._least_chunk = None if chunks or self.times is None else Stream(parameters).chunk(0, 1)

    def like(self, base: Policy) -> Search:
        """The same search, but for what is decided before."""
        known = self._model, self.parameters, self.predictor, self.budget, self.given, self._spec
        return Search(*known, base)

    def run(self) -> Fit | None:
        """The cheapest fitting choice; None if nothing fits: then ``smallest`` is the choice that needs least."""
        return self._settled(self._cheapest)

    def _settled(self, find: Callable[[], Fit | None]) -> Fit | None:
        """Find again, with room for what other steps of a sweep need more than its first, until all steps fit."""
        while True:
            self.smallest = None
            found = find()
            checked = found or self.smallest
            assert checked is not None
            key, first = key_of(checked.choice), self._first(checked.choice)
            is_known = key in self._sweeps
            if not is_known:
                room = 0 if found is None else self.budget - checked.nbytes + first.nbytes
                self._sweeps[key] = self.predictor.sweep_peak(checked.choice.chunks, checked.choice.policy, room)
            exact = self._exactly(checked.choice, self._sweeps[key])
            if found is not None and exact.nbytes <= self.budget:
                return exact
            if found is None and (is_known or exact.nbytes <= checked.nbytes):
                self.smallest = exact
                return None

    def _cheapest(self) -> Fit | None:
        best: Fit | None = None
        for least, make in self._numbers():
            if best is not None and least >= best.cost:
                continue
            chunks = make()
            # streaming costs by itself; it only makes room to recompute less
            bare = [
                self.costs.cost(Choice(chunks, m, replace(self.base, depth=DEPTHS[-1])))[0]
                for m in range(self.regions + 1)
            ]
            for streamed in range(self.regions + 1):
                if best is not None and bare[streamed] >= best.cost:
                    continue
                for depth, offloads in itertools.product(DEPTHS if streamed else DEPTHS[:1], (False, True)):
                    fit = self._border(chunks, streamed, depth, offloads, best)
                    if fit is not None and (best is None or fit.cost < best.cost):
                        best = fit
        return best

    def with_streamed(self, known: Policy) -> Fit:
        """The best fit of the given chunks with weights streamed as in ``known``; else the one that needs least."""
        assert self.given is not None
        chunks, count, depth = self.given, self.costs.stream(known.streamed), known.depth

        def cheapest() -> Fit | None:
            fits = (self._border(chunks, count, depth, offloads, None) for offloads in (False, True))
            return min((f for f in fits if f is not None), key=lambda f: f.cost, default=None)

        best = self._settled(cheapest) or self.smallest
        assert best is not None
        return best

    def _numbers(self) -> Iterator[tuple[Cost, Callable[[], tuple[Chunk, ...]]]]:
        """The cuts to try, each with a bound of its cost: the given one, or where times are unknown the fewest.

        Else those of all counts, the cheapest bound first.
        """
        if self.given is not None:
            given = self.given
            yield (), lambda: given
        elif self.times is None:
            yield from (((), functools.partial(tuple, chunks)) for chunks in self._by_memory())
        else:
            times = self.times
            most = len(self.finest)
            counts = sorted({c for c in COUNTS if c < most} | {most})
            bounds = sorted((least_cost(times, self.costs.states, c), c) for c in counts)
            yield from (((bound,), functools.partial(self.costs.cut, count, times)) for bound, count in bounds)

    def _by_memory(self) -> Iterator[tuple[Chunk, ...]]:
        """With as little streaming as the finest cut needs, the fewest chunks that fit; then the finest."""
        one, last = cut(self.parameters, 1), self.regions
        recomputing = replace(self.base, save_from=last)
        if self._can(one, 0, self.base) or self._can(one, 0, recomputing):
            yield one
            return
        for policy in (recomputing, replace(recomputing, offload_below=last)):
            streamed = next((m for m in range(last + 1) if self._can(self.finest, m, policy)), None)
            if streamed is None:
                continue
            low, high = 1, len(self.finest)
            while low < high:
                middle = (low + high) // 2
                fits = self._can(cut(self.parameters, middle), streamed, policy)
                low, high = (low, middle) if fits else (middle + 1, high)
            yield cut(self.parameters, low)
            return
        yield self.finest

    def _can(self, chunks: tuple[Chunk, ...], streamed: int, policy: Policy) -> bool:
        """Whether this fits with some split of the head, in every step of the sweep."""
        for split in self.head.splits:
            fit = self._fit(Choice(chunks, streamed, replace(policy, head_split=split)))
            self._note(fit)
            if fit.nbytes <= self.budget:
                return True
        return False

    def _border(
        self, chunks: tuple[Chunk, ...], streamed: int, depth: int, offloads: bool, best: Fit | None
    ) -> Fit | None:
        """The cheapest split and recomputation with which a choice fits; None if none does for less than ``best``."""
        found: Fit | None = None
        for split in self.head.splits:
            fit, too_large = self._least_recomputing(chunks, streamed, depth, offloads, split, best)
            if fit is not None and (best is None or fit.cost < best.cost):
                found = best = fit
            # a finer split lets less be recomputed only if the head is what does not fit
            if too_large is None or not (too_large.peak_at in self.head.moments or LATER in too_large.terms):
                break
        return found

    def _least_recomputing(
        self, chunks: tuple[Chunk, ...], streamed: int, depth: int, offloads: bool, split: int, best: Fit | None
    ) -> tuple[Fit | None, Fit | None]:
        """The least recomputation with which a choice fits, unless that costs as much as ``best``.

        Beside it the choice that recomputes one region less, which does not fit; None if all is saved.
        """

        def choice(save_from: int) -> Choice:
            return Choice(chunks, streamed, self._policy(save_from, offloads, split, depth))

        if best is not None and self.costs.cost(choice(0))[0] >= best.cost:  # costs rise with what is recomputed
            return None, None
        all_saved = self._least(choice(0))  # asked first: where it fits, no recomputing variant has to be made
        if all_saved.nbytes <= self.budget:
            all_saved = self._fit(choice(0))
        self._note(all_saved)
        if all_saved.nbytes <= self.budget:
            return all_saved, None
        low, high = 1, self.regions
        found = self._fit(choice(high))
        self._note(found)
        if self.smallest is None or found.nbytes < self.smallest.nbytes:
            self.smallest = found
        if found.nbytes > self.budget:
            return None, found
        low += bisect_left(range(low, high), True, key=lambda s: self._fits_at_least(choice(s)))
        too_large = self._least(choice(low - 1))
        middle = low
        while low < high:
            if best is not None and self.costs.cost(choice(low))[0] >= best.cost:
                return None, too_large
            tried = self._fit(choice(middle))
            self._note(tried)
            if tried.nbytes <= self.budget:
                high, found = middle, tried
            else:
                low, too_large = middle + 1, tried
            middle = (low + high) // 2
        return found, too_large

    def _policy(self, save_from: int, offloads: bool, split: int, depth: int) -> Policy:
        below = save_from if offloads else 0
        return replace(self.base, save_from=save_from, offload_below=below, head_split=split, depth=depth)

    def _least(self, choice: Choice) -> Fit:
        """A choice as if its first chunk were the smallest there is, which demands no more than its own.

        Those programs serve choices of all numbers of chunks, so that few others have to be written.
        """
        return self._exactly(choice, self._least_moment(choice))

    def _fits_at_least(self, choice: Choice) -> bool:
        """Whether a choice fits as `_least` has it; told without its cost."""
        fixed = self.costs.fixed_terms(choice)
        return sum(fixed.values()) + self._least_moment(choice).nbytes <= self.budget

    def _least_moment(self, choice: Choice) -> Moment:
        if self._least_chunk is None:
            return self._first(choice)
        return self._moment(0, self._least_chunk, choice.policy)

    def _fit(self, choice: Choice) -> Fit:
        """A choice by the first chunk's step, with what is known to be needed more by others.

        Where few cuts are compared that is found out for every choice that seems to fit; else only for the best one,
        and those that are the best then (`_settled`).
        """
        moment, key = self._first(choice), key_of(choice)
        has_few_cuts = self.times is None or self.given is not None
        if has_few_cuts and key not in self._sweeps and self._exactly(choice, moment).nbytes <= self.budget:
            self._sweeps[key] = self.predictor.sweep_peak(choice.chunks, choice.policy)
        more = self._sweeps[key].nbytes - moment.nbytes if key in self._sweeps else 0
        return self._exactly(choice, Moment(moment.label, moment.terms | ({LATER: more} if more else {})))

    def _exactly(self, choice: Choice, moment: Moment) -> Fit:
        fixed = self.costs.fixed_terms(choice)
        return Fit(choice, fixed | moment.terms, moment.label, *self.costs.cost(choice))

    def _first(self, choice: Choice) -> Moment:
        """The largest moment of the first chunk's step."""
        return self._moment(len(choice.chunks), choice.chunks[0], choice.policy)

    def _moment(self, count: int, chunk: Chunk, policy: Policy) -> Moment:
        """The largest moment of a chunk's step, looked up by plain numbers: chunks and policies are slow to hash."""
        key = count, policy.save_from, policy.offload_below, policy.head_split
        found = self._moments.get(key)
        if found is None:
            found = self._moments[key] = self.predictor.peak(chunk, policy)
        return found

    def _note(self, fit: Fit) -> None:
        self.considered.append(fit.considered())
