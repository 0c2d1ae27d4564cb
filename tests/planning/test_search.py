"""The search over plans: monotone, optimal on small cases, and every plan fits an independent replay of its terms."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.cuts import ParameterSpec, Stream, cut
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import LinkUse, Policy, StepTimes
from chunkft_fx.planning import search as plan_search
from chunkft_fx.planning.choice import Choice, Fit
from chunkft_fx.planning.chunk_path import cheapest_chunks
from chunkft_fx.planning.planner import Options, parameter_specs, plan_for_batch
from chunkft_fx.planning.search import DEPTHS, Search
from chunkft_fx.predict.fixed_memory import chunk_terms, weight_terms
from chunkft_fx.predict.predictor import Head
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.predict.step_time import Work, bare_steps, step_us, sweep_cost

MB = 10**6


class Blocks(nn.Module):
    """Blocks of two matrices each, without a forward: what the search knows of a model are its parameters."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(count)
        )


class Predicted:
    """A model's predictions by formula: every region saves as much, and needs as much while it runs.

    A step makes gradients of its chunk, ``made`` bytes an element; chunks of a sweep are not equal. At another moment
    of it the head holds ``logits`` bytes, of which a split leaves a part.
    """

    def __init__(
        self, model: Blocks, saved: int, kept: int, work: int, has_times: bool, made: int = 0, logits: int = 0
    ) -> None:
        self.names = [
            frozenset(f"layers.{i}.{n}" for n, _ in layer.named_parameters()) for i, layer in enumerate(model.layers)
        ]
        self.saved, self.kept, self.inside, self.has_times, self.made = saved, kept, work, has_times, made
        self.sizes = {n: p.numel() for n, p in model.named_parameters()}
        self.logits = logits

    def head(self) -> Head:
        return Head((1, 2, 4, 8), frozenset({"head"})) if self.logits else Head()

    def uses(self) -> Sequence[frozenset[str]]:
        return self.names

    def lowest(self, chunk: Chunk) -> int:
        return min(i for i, use in enumerate(self.names) if any(s.name in use for s in chunk.slices))

    def peak(self, chunk: Chunk, saving: Policy) -> Moment:
        above = range(self.lowest(chunk), len(self.names))
        each = saving.micro_batches
        saved = each * sum(self.saved for i in above if i >= saving.save_from)
        kept = each * sum(self.kept for i in above if saving.offload_below <= i < saving.save_from)
        terms = {"saved activations": saved + kept, "gradients": self.made * chunk.numel}
        top = Moment("top", terms | {"workspace": self.inside})
        head = Moment("head", terms | {"workspace": self.logits // saving.head_split})
        return max(top, head, key=lambda m: m.nbytes)

    def sweep_peak(self, chunks: Sequence[Chunk], saving: Policy, enough: int = 0) -> tuple[Chunk, Moment]:
        return max(((c, self.peak(c, saving)) for c in chunks), key=lambda found: found[1].nbytes)

    def times(self, deepest: Chunk) -> StepTimes | None:
        count = len(self.names)
        if not self.has_times:
            return None
        forward, backward, again, gradients, fetch, keep = (
            (us,) * count for us in (100.0, 110.0, 90.0, 100.0, 120.0, 15.0)
        )
        split_us = ((1, 0.0), (2, 15.0), (4, 40.0), (8, 100.0)) if self.logits else ((1, 0.0),)
        return StepTimes(forward, backward, again, gradients, fetch, keep, 2e-4, 1e-5, split_us)

    def offloaded_nbytes(self, below: int) -> int:
        return self.kept * below

    def work(self, chunk: Chunk, times: StepTimes, states_nbytes: int) -> Work:
        share = chunk.numel / sum(self.sizes.values())
        return Work(self.lowest(chunk), share * sum(times.gradients_us), states_nbytes * times.state_us_per_byte)

    def clocked(self, chunk: Chunk, policy: Policy) -> LinkUse | None:
        """The same for all: choices are told apart by sums of times."""
        return LinkUse(1.0, 1.0, 0.0, 0.0, 0, 0, 0.0) if self.has_times else None


cases = st.tuples(
    st.integers(2, 6),
    st.sampled_from([64, 128]),
    st.integers(0, 400_000),
    st.integers(0, 60_000),
    st.integers(0, 100_000),
    st.sampled_from([0, 4, 30]),
    st.sampled_from([0, 100_000, 400_000]),
)
Case = tuple[int, int, int, int, int, int, int]


def searched(case: Case, budget: int, has_times: bool = True) -> tuple[Search, Fit | None]:
    model, predicted = modelled(case, has_times)
    search = Search(model, parameter_specs(model), predicted, budget)
    return search, search.run()


def modelled(case: Case, has_times: bool) -> tuple[Blocks, Predicted]:
    blocks, width, saved, kept, inside, made, logits = case
    model = Blocks(blocks, width)
    return model, Predicted(model, saved, kept, inside, has_times, made, logits)


def needed(search: Search, choice: Choice) -> int:
    """The peak of a choice over every chunk of its sweep, added up anew."""
    costs = search.costs
    streamed = costs.streamed_names(choice.streamed)
    weights = weight_terms(costs.named, costs.resident, costs.uses, streamed, choice.policy.depth)
    return (
        sum(weights.values())
        + sum(chunk_terms(costs.named, choice.chunks).values())
        + max(search.predictor.peak(c, choice.policy).nbytes for c in choice.chunks)
    )


def everything(search: Search) -> list[Choice]:
    """All choices there are, by brute force."""
    assert search.times is not None
    counts = sorted({c for c in plan_search.COUNTS if c < len(search.finest)} | {len(search.finest)})
    regions = range(search.regions + 1)
    savings = [
        Policy(save_from, save_from if offloads else 0, split)
        for save_from, offloads, split in itertools.product(regions, (False, True), search.head.splits)
    ]
    return [
        Choice(search.costs.cut(count, search.times), streamed, replace(saving, depth=depth))
        for count, streamed, saving in itertools.product(counts, regions, savings)
        for depth in (DEPTHS if streamed else DEPTHS[:1])
    ]


def cost(search: Search, choice: Choice) -> float:
    assert search.times is not None
    bare = bare_steps(search.times, choice.policy, frozenset(search.costs.placed(choice.streamed)), choice.policy.depth)
    return sweep_cost(np.array([step_us(bare, search.costs.work(c, search.times)) for c in choice.chunks]))


@pytest.fixture(autouse=True)
def few_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "COUNTS", (1, 2, 3, 4, 6))
    monkeypatch.setattr(plan_search, "MOST_CHUNKS", 9)


@settings(max_examples=40, deadline=None)
@given(cases, st.floats(0.0, 1.2))
def test_the_cheapest_choice_that_fits_is_found(case: Case, share: float) -> None:
    probe, _ = searched(case, 0)
    assert probe.smallest is not None
    everyone = everything(probe)
    largest = max(needed(probe, c) for c in everyone)
    budget = int(probe.smallest.nbytes + share * (largest - probe.smallest.nbytes))
    search, best = searched(case, budget)
    fitting = [c for c in everyone if needed(probe, c) <= budget]
    assert best is not None
    assert needed(search, best.choice) == best.nbytes <= budget
    assert best.cost[0] == pytest.approx(min(cost(probe, c) for c in fitting), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(cases, st.lists(st.floats(0.0, 1.2), min_size=2, max_size=5))
def test_a_larger_budget_never_costs_more(case: Case, shares: list[float]) -> None:
    probe, _ = searched(case, 0)
    assert probe.smallest is not None
    largest = max(needed(probe, c) for c in everything(probe))
    fits = [
        searched(case, int(probe.smallest.nbytes + s * (largest - probe.smallest.nbytes)))[1] for s in sorted(shares)
    ]
    costs = [f.cost[0] for f in fits if f is not None]
    assert len(costs) == len(shares)
    assert costs == sorted(costs, reverse=True)


@settings(max_examples=40, deadline=None)
@given(cases, st.booleans(), st.integers(1, 4))
def test_the_budget_that_an_infeasible_one_is_told_is_feasible(case: Case, has_times: bool, count: int) -> None:
    model, predicted = modelled(case, has_times)

    def plan(budget: int) -> Plan:
        options = Options(budget, "auto", "ascending", 1, 0)
        return plan_for_batch(model, options, None, predicted, "a batch", micro_batches=count)

    with pytest.raises(BudgetInfeasible) as caught:
        plan(1)
    smallest = caught.value.smallest_budget_bytes
    assert plan(smallest).predicted_peak_bytes == smallest
    with pytest.raises(BudgetInfeasible):
        plan(smallest - 1)


def test_the_head_is_split_where_nothing_else_gives_way() -> None:
    """Under a budget that only the head's block exceeds, it is split as little as is needed; under more it is not."""
    case = (3, 64, 10_000, 1_000, 1_000, 0, 400_000)
    _, whole = searched(case, 10**9)
    assert whole is not None
    assert whole.choice.policy.head_split == 1
    _, split = searched(case, whole.nbytes - 150_000)
    assert split is not None
    assert split.choice.policy == Policy(0, 0, 2)
    assert (len(split.choice.chunks), split.choice.streamed) == (len(whole.choice.chunks), whole.choice.streamed)
    assert split.cost[0] > whole.cost[0]


class Summed(Predicted):
    """A head whose sums take more when it is split than the smaller block saves."""

    def peak(self, chunk: Chunk, saving: Policy) -> Moment:
        moment = super().peak(chunk, saving)
        more = 10 * MB if saving.head_split > 1 else 0
        return Moment(moment.label, moment.terms | {"sums": more})


def test_without_times_a_head_that_is_better_whole_needs_no_more_chunks() -> None:
    model = Blocks(3, 64)
    predicted = Summed(model, 300_000, 1_000, 1_000, has_times=False, logits=8)
    probe = Search(model, parameter_specs(model), predicted, 0)
    (one,) = cut(probe.parameters, 1)
    budget = needed(probe, Choice((one,), 0, Policy(3)))
    best = Search(model, parameter_specs(model), predicted, budget).run()
    assert best is not None
    assert (len(best.choice.chunks), best.choice.streamed, best.choice.policy) == (1, 0, Policy(3))


def test_equal_questions_get_equal_plans() -> None:
    model = Blocks(5, 128)
    options = Options(2 * MB, "auto", "ascending", 1, 0)
    plans = [
        plan_for_batch(model, options, None, Predicted(model, 300_000, 40_000, 50_000, True), "b") for _ in range(2)
    ]
    assert plans[0] == plans[1]
    assert json.loads(plans[0].to_json())["predicted_peak_bytes"] == plans[0].predicted_peak_bytes


def test_what_was_not_taken_is_explained_with_the_term_that_did_not_fit() -> None:
    model = Blocks(5, 128)
    predicted = Predicted(model, 300_000, 40_000, 50_000, True)
    plan = plan_for_batch(model, Options(2 * MB, "auto", "ascending", 1, 0), None, predicted, "a batch")
    over = [c for c in plan.considered if c.nbytes > 2 * MB]
    assert over
    text = " ".join(plan.explain().split())  # lines are folded
    assert all(c.largest in text for c in over)
    assert "over budget" in text
    assert "fits, but is not better" in text or all(c.nbytes > 2 * MB for c in plan.considered)


specs = st.lists(st.integers(1, 12), min_size=2, max_size=6)


@given(specs, st.integers(2, 5))
def test_the_path_through_the_cuts_is_the_cheapest(sizes: list[int], count: int) -> None:
    parameters = [ParameterSpec(f"p{i}", (64 * n,), 12, i) for i, n in enumerate(sizes)]
    weights: dict[Chunk, float] = {}

    def price(chunk: Chunk) -> float:
        return weights.setdefault(chunk, 1.0 + torch.rand(()).item())

    torch.manual_seed(0)
    chunks = cheapest_chunks(parameters, count, price)
    stream = Stream(parameters)
    layers = [stream.choices(k, count) for k in range(1, count)]
    totals = []
    for inner in itertools.product(*(list(enumerate(layer)) for layer in layers)):
        ends = [0, *(piece for _, piece in inner), stream.pieces]
        if ends == sorted(set(ends)):
            places = [*(place for place, _ in inner), 0]
            parts = [stream.chunk(a, b) for a, b in itertools.pairwise(ends)]
            totals.append(sum(price(c) * (1 + 0.01 * p) for c, p in zip(parts, places, strict=True)))
    if not totals:
        assert chunks == cut(parameters, count)
        return
    ends = list(itertools.accumulate(sum(s.length for s in c.slices) for c in chunks))
    places = [layers[k].index(ends[k]) for k in range(count - 1)] + [0]
    found = sum(price(c) * (1 + 0.01 * p) for c, p in zip(chunks, places, strict=True))
    assert found == pytest.approx(min(totals), rel=1e-12)
    assert sum(c.numel for c in chunks) == sum(64 * n for n in sizes)
