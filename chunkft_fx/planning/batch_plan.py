"""Decides by which plan a batch runs, before it does, or refuses it.

A session can be called with batches of other sizes than it was captured for. Each is compared with those that plans
were made for: a batch that is no larger in any size runs as the larger one would; any other is planned first, with its
sizes rounded up where that fits the budget, so that few of many lengths are. While no sweep has begun everything is
chosen anew for the largest batch so far; then chunks and streamed weights stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.copies.residency import Residency
from chunkft_fx.copies.states.stage import StageOwner
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.graph.sizes import Sizes, size_reader
from chunkft_fx.machine.garbage import COLLECTOR
from chunkft_fx.machine.memory_limit import LIMITS, take_workspaces
from chunkft_fx.machine.overhead import overhead
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.state_spec import spec_of
from chunkft_fx.planning.coverage.auto import covering_plan
from chunkft_fx.planning.planner import Options, plan_again
from chunkft_fx.predict.fixed_memory import (
    RING_OF_GRADIENTS,
    RING_OF_STATES,
    chunk_terms,
    piece_terms,
    resident_nbytes,
    weight_terms,
)
from chunkft_fx.predict.predictor import BATCH, Predictor
from chunkft_fx.predict.step_clock import Span
from chunkft_fx.predict.step_memory import most_workspace, step_timeline, storages_nbytes
from chunkft_fx.program.programs import Programs
from chunkft_fx.ranks.ranks import Ranks

# Of a session's plans the newest are kept; a plan that is asked for again is made again.
KEPT_PLANS = 64


@dataclass(frozen=True)
class Need:
    """What a call asks of a plan: the sizes of a micro-batch, how many there are, the bytes of all of them, and the
    tangents that are expected."""

    sizes: Sizes
    nbytes: int
    expected: frozenset[str]
    micro_batches: int = 1


@dataclass(frozen=True)
class Made:
    """A plan, and the need that it was made for."""

    need: Need
    plan: Plan


class PlanOwner(Protocol):
    """What plans need of the compiled module.

    ``known_plan`` is the plan that is gone by, if there is one; ``is_bound`` says that another cut into chunks would
    lose something, ``begun_coverage`` what steps cover if that cannot be chosen any more. ``plain`` is the wrapped
    model, ``gradient_nbytes`` the bytes of gradients that slices hold. ``follow_updates`` puts what follows behind
    those of the step before, which may still run.
    """

    @property
    def residency(self) -> Residency: ...

    @property
    def optimizer(self) -> StageOwner | None: ...

    @property
    def plain(self) -> nn.Module: ...

    @property
    def options(self) -> Options: ...

    @property
    def known_plan(self) -> Plan | None: ...

    @property
    def is_bound(self) -> bool: ...

    @property
    def begun_coverage(self) -> str | None: ...

    @property
    def gradient_nbytes(self) -> int: ...

    @property
    def ranks(self) -> Ranks: ...

    def follow_updates(self) -> None: ...

    def adopt(self, plan: Plan) -> None: ...


class BatchPlans:
    """The plans of one capture's programs.

    ``owner`` gives the compiled module, ``batch`` are the positions of the arguments that are neither weights nor
    buffers, ``constants_nbytes`` the bytes of tensors that the capture itself holds. ``beside`` gives what goes on
    while a plan is settled. ``joined`` are the outputs, as fake tensors, that are joined to those of a whole batch
    where the micro-batches are parts of one: one after the other, so that the largest of them is there twice; None for
    micro-batches that are not.
    """

    def __init__(
        self,
        owner: Callable[[], PlanOwner],
        programs: Programs,
        batch: Sequence[int],
        constants_nbytes: int,
        beside: Callable[[Plan, frozenset[str]], AbstractContextManager[None]],
        joined: tuple[Tensor, ...] | None = None,
    ) -> None:
        self._owner, self._programs, self._batch = owner, programs, tuple(batch)
        self._beside, self._joined = beside, joined
        self._constants_nbytes = constants_nbytes
        capture = programs.capture
        self._reader = size_reader(capture.graph, capture.primals)
        by_name = {n.name: n for n in capture.graph.find_nodes(op="placeholder")}
        self._values = [by_name[capture.primals[i]].meta["val"] for i in self._batch]
        self._made: list[Made] = []  # the newest first
        self._refused: list[tuple[Plan, Need]] = []  # rounded needs that a plan's chunks have no room for
        self._evaluated: list[tuple[Plan, Need, int]] = []
        self._in_force: Made | None = None

    def prepare(self, batches: Sequence[Sequence[Any]], expected: frozenset[str]) -> Policy:
        """The policy of a plan, now in force, that a training step on these arguments fits; nothing has run of it yet.

        ``batches`` are the arguments of each micro-batch of the step, all of the same sizes. Raises `BudgetInfeasible`,
        with the plan in force and everything else as before, if there is none.
        """
        need = self._need(batches, expected)
        fit = next((made for made in self._made if self._holds(made, need)), None)
        if fit is None:
            with COLLECTOR.seldom():
                fit = self._planned(need)
            self._made = [fit, *(m for m in self._made if not self._outdone(m, fit))][:KEPT_PLANS]
        self._in_force = fit
        return fit.plan.policy

    def check_evaluation(self, arguments: Sequence[Any]) -> None:
        """Raise `BudgetInfeasible` for a call without gradients that does not fit beside what training holds.

        Before there is a plan nothing is refused: the budget holds from the first training batch on.
        """
        owner = self._owner()
        plan = owner.known_plan
        if plan is None or not plan.batch:
            return
        need, room = self._need([arguments], frozenset()), plan.budget_bytes - owner.gradient_nbytes
        known = [(k, n) for p, k, n in self._evaluated if _alike(p, plan) and self._covers(k, need)]
        if any(nbytes <= room for _, nbytes in known):
            return
        # that a larger one was refused says nothing of this
        peak = next((nbytes for k, nbytes in known if k == need), None)
        if peak is None:
            peak = self._evaluation_nbytes(owner, plan, need)
            self._evaluated = [(plan, need, peak), *self._evaluated][:KEPT_PLANS]
        peak += owner.gradient_nbytes
        if peak > plan.budget_bytes:
            raise BudgetInfeasible(
                f"budget {format_bytes(plan.budget_bytes)} is too small to evaluate {self._described(need)} beside "
                f"what training holds: it needs {format_bytes(peak)}; evaluate smaller batches, or raise the budget to "
                f"at least {peak} bytes",
                peak,
                {"evaluation": peak},
            )

    def needed(self) -> str:
        """What the plan in force says of memory, for an error that says it was not enough."""
        if self._in_force is None:
            return "no plan was made yet"
        plan = self._in_force.plan
        peak = 0 if plan.predicted_peak_bytes is None else plan.predicted_peak_bytes
        return (
            f"the plan for {plan.batch} needs {format_bytes(peak)} of the budget of {format_bytes(plan.budget_bytes)}, "
            f"most of it in {plan.peak_at}"
        )

    def sizes(self, arguments: Sequence[Any]) -> Sizes:
        """The values of the graph's symbolic sizes in a call."""
        return self._reader.read(arguments)

    def _need(self, batches: Sequence[Sequence[Any]], expected: frozenset[str]) -> Need:
        sizes = self.sizes(batches[0])
        nbytes = storages_nbytes(arguments[i] for arguments in batches for i in self._batch)
        return Need(sizes, nbytes + len(batches) * self._joined_nbytes(sizes), expected, len(batches))

    def _joined_nbytes(self, sizes: Sizes) -> int:
        """The bytes of a micro-batch in the largest of the outputs that are joined."""
        return max((sizes.nbytes(v) for v in self._joined or ()), default=0)

    def _covers(self, larger: Need, need: Need) -> bool:
        are_as_many = larger.micro_batches == need.micro_batches
        is_alike = larger.expected == need.expected and larger.nbytes >= need.nbytes
        return are_as_many and is_alike and self._reader.covers(larger.sizes, need.sizes)

    def _holds(self, made: Made, need: Need) -> bool:
        """Whether a plan still says what is done, and covers a need."""
        owner = self._owner()
        if not _alike(made.plan, owner.known_plan) or not self._covers(made.need, need):
            return False
        planned, states = made.plan.policy.states, spec_of(owner.optimizer)
        return planned == states or (planned.covers(states) and owner.is_bound)

    def _outdone(self, made: Made, by: Made) -> bool:
        return not _alike(made.plan, by.plan) or self._covers(by.need, made.need)

    def _planned(self, need: Need) -> Made:
        """Plan, for the rounded sizes if the budget has room for them, and settle the plan."""
        rounded, known = self._rounded(need), self._owner().known_plan
        refused = [n for plan, n in self._refused if _alike(plan, known)]
        if rounded == need or any(self._covers(rounded, n) for n in refused):
            made = self._chosen(need)
        else:
            try:
                made = self._chosen(rounded)
            except BudgetInfeasible:
                if known is not None and known.batch:
                    self._refused = [(known, rounded), *self._refused][:KEPT_PLANS]
                made = self._chosen(need)
        if known is None or not known.batch:
            made = self._agreed(made)
        with self._beside(made.plan, need.expected):
            settle(self._owner(), made.plan)
        return made

    def _chosen(self, need: Need) -> Made:
        """The plan for a need, which changes nothing yet."""
        batch = self._described(need)
        plan = _choose(self._owner(), lambda: self._predictor(need), batch, need)
        # a plan that was kept can be one for the same micro-batches, which were no parts of a batch
        return Made(need, replace(plan, batch_nbytes=need.nbytes, batch=batch))

    def _agreed(self, made: Made) -> Made:
        """The plan that all ranks go by, cut alike: that of the rank which has to save most, made anew for the others.

        Policies may differ in what concerns no other rank, such as what is recomputed.
        """
        owner, plan = self._owner(), made.plan
        if len(set(owner.ranks.compare("a plan", _together(plan)))) == 1:
            return made
        plans = [Plan.from_json(text) for text in owner.ranks.compare("plans", plan.to_json())]
        chosen = max(plans, key=lambda p: (p.coverage == "one", len(p.chunks), p.policy.host_gradients))
        if _together(chosen) == _together(plan):
            return made
        need, spec = made.need, spec_of(owner.optimizer)
        predictor, count = self._predictor(need), need.micro_batches
        return Made(need, plan_again(owner.plain, owner.options, chosen, predictor, plan.batch, spec, count))

    def _predictor(self, need: Need) -> Predictor:
        owner = self._owner()
        return Predictor(
            self._programs,
            frozenset(self._programs.capture.tangents) - need.expected,
            known=owner.options.rates,
            sizes=need.sizes,
            given=self.given(need),
            spec=spec_of(owner.optimizer),
            micro_batches=need.micro_batches,
            link=owner.options.link,
        )

    def spans(self) -> tuple[Span, ...]:
        """What a step by the plan in force does, and when: empty where it does not cover all parameters, or no times
        are known."""
        made = self._in_force
        if made is None or not made.plan.policy.pieces:
            return ()
        return self._predictor(made.need).spans(made.plan.chunks[0], made.plan.policy)

    def given(self, need: Need) -> dict[str, int]:
        """The bytes by name that are there before a step on a batch, beside weights and what training keeps."""
        return {BATCH: self._constants_nbytes + need.nbytes}

    def _rounded(self, need: Need) -> Need:
        sizes = self._reader.rounded(need.sizes)
        more = sum(sizes.nbytes(v) - need.sizes.nbytes(v) for v in self._values)
        more += self._joined_nbytes(sizes) - self._joined_nbytes(need.sizes)
        return replace(need, sizes=sizes, nbytes=need.nbytes + more * need.micro_batches)

    def _described(self, need: Need) -> str:
        shapes = [need.sizes.shape(v) for v in self._values if isinstance(v, Tensor) and v.ndim]
        batches = "a batch" if need.micro_batches == 1 else f"{need.micro_batches} micro-batches, each"
        if self._joined is not None:
            batches = f"a batch that is split into {batches}"
        return f"{batches} with inputs of shapes {shapes[:4]}"

    def _evaluation_nbytes(self, owner: PlanOwner, plan: Plan, need: Need) -> int:
        residency, policy = owner.residency, plan.policy
        evaluation = self._programs.evaluation(replace(Policy(), streamed=residency.away(), depth=residency.depth))
        moments = step_timeline(evaluation, self._programs.backend, sizes=need.sizes)
        largest = max((m.nbytes for m in moments), default=0)
        resident = weight_terms(
            residency.parameters, resident_nbytes(owner.plain), self._programs.uses, policy.streamed, policy.depth
        )
        if policy.pieces:
            kept = piece_terms(residency.parameters, plan.chunks[0], policy, policy.states, policy.streamed)
            staged = kept[RING_OF_STATES] + kept.get(RING_OF_GRADIENTS, 0)
        else:
            kept = chunk_terms(residency.parameters, plan.chunks, policy.states)
            staged = kept["optimizer state of the active chunk"]
        terms = [*resident.values(), staged]
        terms += [self._constants_nbytes + need.nbytes, largest]
        return sum(terms) + sum(overhead(residency.device, largest, most_workspace(moments)).values())


def _together(plan: Plan) -> str:
    """What of a plan all ranks have to have in common."""
    policy = plan.policy
    said = (plan.coverage, plan.order, plan.interval, plan.warms_up, plan.chunks, policy.pieces.chunks)
    return hashlib.sha256(repr((said, policy.in_backward, policy.host_gradients)).encode()).hexdigest()


def _alike(plan: Plan, other: Plan | None) -> bool:
    """Whether two plans have the same chunks, and weights in the same places."""
    if other is None or not other.batch or plan.chunks is not other.chunks:
        return False
    return plan.policy.same_places(other.policy)


def _choose(owner: PlanOwner, predictor: Callable[[], Predictor], batch: str, need: Need) -> Plan:
    """The plan for a need; while that loses nothing, all is chosen anew for the largest batch."""
    model, options, known, optimizer = owner.plain, owner.options, owner.known_plan, owner.optimizer
    spec, count = spec_of(optimizer), need.micro_batches

    def anew(given: Plan | None) -> Plan:
        untaken = None if optimizer is None else optimizer.untaken_nbytes
        return covering_plan(model, options, given, predictor, batch, spec, count, owner.begun_coverage, untaken)

    if known is None or not known.batch:
        return anew(known)
    if owner.is_bound:
        return plan_again(model, options, known, predictor(), batch, spec, count)
    given = None if options.chunks == "auto" else known
    if need.nbytes > known.batch_nbytes or spec != known.policy.states:
        return anew(given)
    try:
        return plan_again(model, options, known, predictor(), batch, spec, count)
    except BudgetInfeasible:
        return anew(given)


def settle(owner: PlanOwner, plan: Plan) -> None:
    """Put weights, and memory that stays, where a plan wants them, and go by the plan.

    Of plans with the same chunks, places and kind of states, the one that needs most is shown.
    """
    known, residency = owner.known_plan, owner.residency
    if known is not None and _alike(plan, known):
        is_larger = (plan.predicted_peak_bytes or 0) > (known.predicted_peak_bytes or 0)
        if is_larger or plan.policy.states != known.policy.states:
            owner.adopt(plan)
        return
    owner.follow_updates()
    optimizer = owner.optimizer
    if optimizer is not None and known is not None and plan.chunks is not known.chunks:
        optimizer.drop_stage()
    LIMITS.set_up(owner, residency.device)
    residency.settle(plan.policy.streamed, plan.policy.depth)
    LIMITS.hold(owner, residency.device, plan.budget_bytes)
    owner.adopt(plan)
    # what stays is taken before a step takes anything: between its blocks it would split their memory
    take_workspaces(residency.device)
    if optimizer is not None:
        optimizer.take_stage()
