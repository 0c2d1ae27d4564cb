"""Decides the plan: from what the user asked and what a captured model predicts of itself.

The search itself is `planning.search`; here its result becomes a `Plan`, or an error that says what would be enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from chunkft_fx.bytes import format_bytes
from chunkft_fx.capture.blocks import block_paths, region_of_parameters
from chunkft_fx.errors import BudgetInfeasible, NoTrainableParameters, UninitializedParameters, UnsupportedParameter
from chunkft_fx.graph.region import Pass, ProgramPass
from chunkft_fx.machine.rates import ALONE, RankLink, Rates
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.cuts import ParameterSpec, cut
from chunkft_fx.plan.pieces import DEPTH, Pieces, cut_pieces
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.schedule import interval_of
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec
from chunkft_fx.plan.table import Considered
from chunkft_fx.planning.choice import Choice, Fit, Predicts
from chunkft_fx.planning.costs import BASE, ChoiceCosts
from chunkft_fx.planning.coverage.asked import only_coverage
from chunkft_fx.planning.coverage.ring import best_ring
from chunkft_fx.planning.search import Search
from chunkft_fx.predict.fixed_memory import Terms

# Of the choices that were not taken, a plan keeps so many, those that came closest.
KEPT_CHOICES = 40

# How regions are lowered: compiled by Inductor, or run as rewritten FX graphs.
BACKENDS = ("inductor", "eager")

BEGUN = (
    "; chunks and streamed weights are those of an earlier batch, because a sweep with them has begun: "
    "give compile the largest batch (batch=...) to have them chosen for it"
)


@dataclass(frozen=True)
class Options:
    """What the user asked of `chunkft_fx.compile`, checked and parsed.

    ``batch`` is an example of the largest batch; ``passes`` and ``program_passes`` are passes of the user's own.
    ``rates`` are those of another machine than this one, for which a plan is to be made; ``link`` joins the ranks
    that train the model together.
    """

    budget_bytes: int
    chunks: int | str
    order: str
    interval: int | str
    seed: int
    return_logits: bool = False
    coverage: str = "one"
    batch: Any = field(default=None, compare=False)
    passes: tuple[Pass, ...] = ()
    program_passes: tuple[ProgramPass, ...] = ()
    rates: Rates | None = None
    link: RankLink = ALONE

    def described(self) -> str:
        """What all ranks that train one model have to ask alike: all but the budget of their device."""
        passes = [*(p.name for p in self.passes), *(p.name for p in self.program_passes)]
        rest = (self.seed, self.return_logits, self.coverage, self.batch is not None, passes, self.link.ranks)
        return repr((self.chunks, self.order, self.interval, *rest))


def refuse_untrainable(model: nn.Module) -> None:
    """Raise for a model that cannot be trained: `NoTrainableParameters`; `UninitializedParameters` for lazy ones;
    `UnsupportedParameter` for one that AdamW's update is not defined for."""
    lazy = next((n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None)
    if lazy is not None:
        raise UninitializedParameters(
            f"parameter {lazy} has no shape yet, because it belongs to a lazy module that was never called; "
            "call the plain model once on a batch (under torch.no_grad()) before chunkft_fx.compile"
        )
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise NoTrainableParameters(
            "no parameter of this model has requires_grad=True; call model.requires_grad_(True) before compile"
        )
    for name, p in trainable:
        if p.is_complex():
            raise UnsupportedParameter(
                f"parameter {name!r} is {p.dtype}, and complex parameters cannot be trained; hold its real and "
                "imaginary parts in a real parameter (torch.view_as_complex), or freeze it with requires_grad_(False)"
            )


def parameter_specs(model: nn.Module, spec: StateSpec = ASSUMED) -> tuple[ParameterSpec, ...]:
    """The trainable parameters as the planner sees them, in ``named_parameters`` order (tied ones once)."""
    refuse_untrainable(model)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    regions = region_of_parameters([n for n, _ in trainable], block_paths(model.named_modules()))
    return tuple(
        ParameterSpec(
            name,
            tuple(p.shape),
            p.dtype.itemsize + spec.element_nbytes(p.shape, p.dtype),
            region,
            spec.is_whole,
            spec.index_nbytes(p.shape, p.dtype),
        )
        for (name, p), region in zip(trainable, regions, strict=True)
    )


def first_plan(model: nn.Module, options: Options, spec: StateSpec = ASSUMED) -> Plan | None:
    """The plan as far as it can be made before a batch is seen; None when ``chunks="auto"`` needs one."""
    parameters = parameter_specs(model, spec)
    if options.chunks == "auto" and options.coverage != "all":
        return None
    chunks = cut(parameters, 1 if options.coverage == "all" else int(options.chunks))
    if options.coverage != "auto":
        return _bare_plan(options, chunks)
    only = only_coverage(options.chunks, options.order, options.interval, spec)
    assert only is not None, "a number of chunks was given"
    return replace(_bare_plan(options, chunks), coverage=only[0], coverage_reason=only[1])


def _bare_plan(options: Options, chunks: tuple[Chunk, ...]) -> Plan:
    """A plan of these chunks without what depends on a batch."""
    interval = interval_of(options.interval, len(chunks))
    warms_up = options.interval == "auto" and len(chunks) > 1
    return Plan(
        options.budget_bytes, chunks, options.order, interval, options.seed, warms_up, coverage=options.coverage
    )


def plan_for_batch(
    model: nn.Module,
    options: Options,
    known: Plan | None,
    predictor: Predicts,
    batch: str,
    spec: StateSpec = ASSUMED,
    micro_batches: int = 1,
) -> Plan:
    """Complete a plan for a batch: all that is still open in it, by what is predicted of its steps.

    ``options.coverage`` is "one" or "all" (`planning.coverage` chooses where it is "auto"). A step runs
    ``micro_batches`` such batches.
    Raises `BudgetInfeasible`, with the smallest budget that is enough, when nothing fits.
    """
    chunks = None if known is None else known.chunks
    parameters = parameter_specs(model, spec)
    base = replace(_base(options, parameters, spec), micro_batches=micro_batches)
    if base.pieces and chunks is None:
        chunks = cut(parameters, 1)
    search = Search(model, parameters, predictor, options.budget_bytes, chunks, spec, base)
    best = search.run()
    if base.pieces and not base.in_backward and (best is None or best.step_us is not None):
        # gradients of all parameters can wait beside the device, where a step without them there takes less
        beside = search.like(replace(base, host_gradients=True, late=spec.is_late))
        other = beside.run()
        if best is None or (other is not None and other.cost < best.cost):
            beside.considered += search.considered
            search, best = beside, other
    if best is None:
        assert search.smallest is not None
        raise _infeasible(options.budget_bytes, search.smallest, batch)
    if base.in_backward and best.step_us is not None:
        predictor, whole = search.predictor, best.choice.chunks[0]
        search, best = best_ring(search, best, lambda found, fit: predictor.clocked(whole, _policy(found, fit, spec)))
    plan = _bare_plan(options, best.choice.chunks)
    return _completed(plan, search, best, batch, _closest(search.considered, best), spec)


def plan_again(
    model: nn.Module,
    options: Options,
    known: Plan,
    predictor: Predicts,
    batch: str,
    spec: StateSpec = ASSUMED,
    micro_batches: int = 1,
) -> Plan:
    """The plan for another batch, or several: chunks and streamed weights stay as in ``known``, the rest may change.

    Raises `BudgetInfeasible` when that cannot be enough.
    """
    policy, budget = known.policy, options.budget_bytes
    pieces = policy.pieces

    def kept(pieces: Pieces) -> tuple[Search, Fit]:
        base = replace(
            BASE,
            pieces=pieces,
            in_backward=policy.in_backward,
            host_gradients=policy.host_gradients,
            late=policy.late,
            micro_batches=micro_batches,
            ranks=options.link.ranks,
        )
        search = Search(model, parameter_specs(model, spec), predictor, budget, known.chunks, spec, base)
        return search, search.with_streamed(policy)

    search, best = kept(pieces)
    if best.nbytes > budget and pieces.depth > DEPTH:
        search, best = kept(replace(pieces, depth=DEPTH))
    if best.nbytes > budget:
        raise _infeasible(budget, best, batch, BEGUN)
    return _completed(known, search, best, batch, (), spec)


def needed_nbytes(model: nn.Module, plan: Plan, predictor: Predicts, spec: StateSpec = ASSUMED) -> int:
    """Bytes that the first step of a plan is predicted to need, told from the plan alone."""
    costs = ChoiceCosts(model, parameter_specs(model, spec), predictor, None, spec)
    fixed = costs.fixed_terms(Choice(plan.chunks, costs.stream(plan.policy.streamed), plan.policy))
    return sum(fixed.values()) + predictor.peak(plan.chunks[0], plan.policy).nbytes


def _base(options: Options, parameters: Sequence[ParameterSpec], spec: StateSpec) -> Policy:
    """What is decided before the search."""
    base = replace(BASE, ranks=options.link.ranks)
    if options.coverage != "all":
        return base
    return replace(base, pieces=cut_pieces(parameters), in_backward=spec.in_backward)


def _completed(
    plan: Plan, search: Search, best: Fit, batch: str, considered: Sequence[Considered], states: StateSpec
) -> Plan:
    policy = _policy(search, best, states)
    # sums of times are enough to compare choices; what the one that was taken costs in all, its program tells
    link = search.predictor.clocked(plan.chunks[0], policy) if policy.pieces else None
    return replace(
        plan,
        policy=policy,
        predicted_peak_bytes=best.nbytes,
        predicted_step_us=best.step_us if link is None else link.step_us,
        link=link,
        peak_at=best.peak_at,
        terms=_largest_first(best.terms),
        host_terms=_largest_first(search.costs.host_terms(replace(best.choice, policy=policy))),
        considered=tuple(considered),
        batch=batch,
    )


def _policy(search: Search, best: Fit, states: StateSpec) -> Policy:
    """The policy of a choice, with all that the search has no need of."""
    return replace(
        best.choice.policy,
        streamed=search.costs.streamed_names(best.choice.streamed),
        pacing=search.times if states.is_kept and not search.base.pieces else None,
        states=states,
    )


def _largest_first(terms: Terms) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(terms.items(), key=lambda item: -item[1]))


def _closest(considered: Sequence[Considered], best: Fit) -> list[Considered]:
    """The choices that were not taken, those first that the budget would have to grow least for."""
    taken = _order(best.considered())
    others = {c for c in considered if _order(c) != taken}
    return sorted(others, key=lambda c: (c.nbytes, *_order(c)))[:KEPT_CHOICES]


def _order(c: Considered) -> tuple[int, ...]:
    return c.chunks, c.streamed, c.policy.save_from, *c.policy.complexity


def _infeasible(budget: int, smallest: Fit, batch: str, why: str = "") -> BudgetInfeasible:
    needed, choice = smallest.nbytes, smallest.choice
    largest = sorted(smallest.terms.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in largest)
    fewer = "" if choice.policy.pieces else "use more chunks, "
    return BudgetInfeasible(
        f"budget {format_bytes(budget)} is too small for {batch}: with {len(choice.chunks)} chunk(s), weights of "
        f"{choice.streamed} regions streamed and all activations recomputed the step needs {format_bytes(needed)} "
        f"({listed}); raise the budget to at least {needed} bytes, {fewer}make one step of smaller micro-batches "
        f"(model.accumulate), or shorten the sequence{why}",
        needed,
        dict(largest),
    )
