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


def coarse_to_fine(count: int) -> list[int]:
    """The numbers below ``count``: its ends, what halves it, quarters it and so on.

    What is found at the first of them bounds the ones between, most of which need not be looked at then.
    """
    steps = itertools.takewhile(bool, (count >> power for power in itertools.count(1)))
    halved = (number for step in steps for number in range(step, count, step))
    return list(dict.fromkeys([count - 1, 0, *halved]))


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
        # by number of chunks the one whose steps are looked at: the first, until another is seen to need more
        self._largest: dict[int, Chunk] = {}
        # by number of chunks, how the head is split and whether regions offload: by the region saved from, the moments
        self._moments: dict[tuple[int, int, bool], dict[int, Moment]] = {}
        self.finest = chunks or cut(parameters, min(max_chunks(parameters), MOST_CHUNKS))
        self.times = predictor.times(self.finest[0])
        self.costs = ChoiceCosts(model, parameters, predictor, self.times, spec)
        self.regions = self.costs.regions
        # where cuts of many counts are compared, the most saving step on what every first chunk holds at least
        self._least = None if chunks or self.times is None else self._most_saving(Stream(parameters).chunk(0, 1))

    def like(self, base: Policy) -> Search:
        """The same search, but for what is decided before."""
        known = self._model, self.parameters, self.predictor, self.budget, self.given, self._spec
        return Search(*known, base)

    def run(self) -> Fit | None:
        """The cheapest fitting choice; None if nothing fits: then ``smallest`` is the choice that needs least."""
        return self._settled(self._cheapest)

    def _settled(self, find: Callable[[], Fit | None]) -> Fit | None:
        """Find again, by the step of a sweep that needs most in place of its first, until all steps fit."""
        while True:
            self.smallest = None
            found = find()
            checked = found or self.smallest
            assert checked is not None
            count, key = len(checked.choice.chunks), key_of(checked.choice)
            is_known = key in self._sweeps
            if not is_known:
                moment = self._moment(checked.choice)
                room = 0 if found is None else self.budget - checked.nbytes + moment.nbytes
                chunk, self._sweeps[key] = self.predictor.sweep_peak(checked.choice.chunks, checked.choice.policy, room)
            exact = self._exactly(checked.choice, self._sweeps[key])
            if found is not None and exact.nbytes <= self.budget:
                return exact
            if found is None and (is_known or exact.nbytes <= checked.nbytes):
                self.smallest = exact
                return None
            if not is_known:
                self._look_at(count, chunk)

    def _look_at(self, count: int, chunk: Chunk) -> None:
        """Tell what choices of that many chunks need by this chunk's steps from now on."""
        self._largest[count] = chunk
        self._moments = {key: moments for key, moments in self._moments.items() if key[0] != count}

    def _cheapest(self) -> Fit | None:
        best: Fit | None = None
        postponed: list[Fit] = []
        for least, make in self._numbers():
            if best is not None and least >= best.cost:
                continue
            chunks = make()
            floor = self._floor(chunks)
            if floor is not None and floor.nbytes > self.budget:
                self.considered.append(floor.considered())
                postponed.append(floor)
            else:
                best = self._cheapest_of(chunks, best)
        if best is not None:
            return best
        for floor in sorted(postponed, key=lambda f: f.nbytes):  # to tell what the least is that is needed
            if self.smallest is None or floor.nbytes < self.smallest.nbytes:
                self._cheapest_of(floor.choice.chunks, None)
        return None

    def _floor(self, chunks: tuple[Chunk, ...]) -> Fit | None:
        """What any choice of these chunks needs at least, with the choice that would; None where it is not asked."""
        if self._least is None:
            return None
        policy, moment = self._least
        wheres = itertools.product(range(self.regions + 1), DEPTHS)
        choices = (Choice(chunks, m, replace(policy, depth=d)) for m, d in wheres)
        return self._exactly(min(choices, key=lambda c: sum(self.costs.fixed_terms(c).values())), moment)

    def _most_saving(self, chunk: Chunk) -> tuple[Policy, Moment]:
        """The policy that lets a step on this chunk need least, and its largest moment."""
        ways = itertools.product((False, True), self.head.splits)
        policies = [self._policy(self.regions, offloads, split, DEPTH) for offloads, split in ways]
        moments = [(policy, self.predictor.peak(chunk, policy)) for policy in policies]
        return min(moments, key=lambda found: found[1].nbytes)

    def _cheapest_of(self, chunks: tuple[Chunk, ...], best: Fit | None) -> Fit | None:
        """The cheapest fitting choice of these chunks, or ``best`` if none costs less."""
        # streaming costs by itself; it only makes room to recompute less
        bare = [
            self.costs.cost(Choice(chunks, m, replace(self.base, depth=DEPTHS[-1])))[0] for m in range(self.regions + 1)
        ]
        for streamed in coarse_to_fine(self.regions + 1):
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
            fit = self._noted(Choice(chunks, streamed, replace(policy, head_split=split)))
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

        hopeless = self._known_hopeless(choice)
        low = 0 if hopeless is None else hopeless.choice.policy.save_from + 1
        if best is not None and self.costs.cost(choice(low))[0] >= best.cost:  # costs rise with what is recomputed
            return None, hopeless
        if low == 0:  # asked first: where all can be saved, no recomputing variant has to be made
            all_saved = self._noted(choice(0))
            if all_saved.nbytes <= self.budget:
                return all_saved, None
            low = 1
            hopeless = all_saved
        high = self.regions
        found = self._noted(choice(high))
        if self.smallest is None or found.nbytes < self.smallest.nbytes:
            self.smallest = found
        if found.nbytes > self.budget:
            return None, found
        too_large = hopeless
        while low < high:
            if best is not None and self.costs.cost(choice(low))[0] >= best.cost:
                return None, too_large
            middle = (low + high) // 2
            tried = self._noted(choice(middle))
            if tried.nbytes <= self.budget:
                high, found = middle, tried
            else:
                low, too_large = middle + 1, tried
        return found, too_large

    def _known_hopeless(self, choice: Callable[[int], Choice]) -> Fit | None:
        """Of choices that are known not to fit, by moments looked at before, the one that recomputes most."""
        room = self.budget - sum(self.costs.fixed_terms(choice(0)).values())
        # of a group that offloads, where it does; what recomputes nothing has nothing to offload
        known = self._moments.get(self._group(choice(self.regions)), {})
        too_large = [save_from for save_from, moment in known.items() if moment.nbytes > room]
        return self._exactly(choice(max(too_large)), known[max(too_large)]) if too_large else None

    def _policy(self, save_from: int, offloads: bool, split: int, depth: int) -> Policy:
        below = save_from if offloads else 0
        return replace(self.base, save_from=save_from, offload_below=below, head_split=split, depth=depth)

    def _fit(self, choice: Choice) -> Fit:
        """A choice by one step of its sweep, with what is known to be needed more by others.

        Where few cuts are compared that is found out for every choice that seems to fit; else only for the best one,
        and those that are the best then (`_settled`).
        """
        moment, key = self._moment(choice), key_of(choice)
        has_few_cuts = self.times is None or self.given is not None
        if has_few_cuts and key not in self._sweeps and self._exactly(choice, moment).nbytes <= self.budget:
            _, self._sweeps[key] = self.predictor.sweep_peak(choice.chunks, choice.policy)
        more = self._sweeps[key].nbytes - moment.nbytes if key in self._sweeps else 0
        return self._exactly(choice, Moment(moment.label, moment.terms | ({LATER: more} if more else {})))

    def _exactly(self, choice: Choice, moment: Moment) -> Fit:
        fixed = self.costs.fixed_terms(choice)
        return Fit(choice, fixed | moment.terms, moment.label, *self.costs.cost(choice))

    def _group(self, choice: Choice) -> tuple[int, int, bool]:
        """What choices have in common whose moments fall with the region that is saved from."""
        policy = choice.policy
        return len(choice.chunks), policy.head_split, policy.offload_below > 0

    def _moment(self, choice: Choice) -> Moment:
        """The largest moment of a step, looked up by plain numbers: chunks and policies are slow to hash."""
        known = self._moments.setdefault(self._group(choice), {})
        save_from = choice.policy.save_from
        if save_from not in known:
            chunk = self._largest.get(len(choice.chunks), choice.chunks[0])
            known[save_from] = self.predictor.peak(chunk, choice.policy)
        return known[save_from]

    def _noted(self, choice: Choice) -> Fit:
        fit = self._fit(choice)
        self.considered.append(fit.considered())
        return fit
