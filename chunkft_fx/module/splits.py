"""Runs calls whose batch does not fit the budget in parts, where that is proven to give the same.

Such a call ends where the graph of the whole batch would run. The model is then called with each part of the batch,
which ends there as well and leaves the part's inputs; the parts run as one step (`Session.accumulated`). Their outputs
are joined to what the whole batch's graph would give, and the call is made once more, which finds them: so what lies
before and behind the graph happens once, for the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from chunkft_fx.capture.capture import OutputName
from chunkft_fx.errors import BudgetInfeasible, UnsupportedGraph
from chunkft_fx.graph.sizes import SizeReader, size_reader
from chunkft_fx.module.micro_batches import computes_the_same, is_same_input
from chunkft_fx.module.sessions import SessionOwner, Traced, session_of, traced
from chunkft_fx.plan.state_spec import StateSpec, spec_of
from chunkft_fx.runtime.session import Session
from chunkft_fx.splitting.arguments import Arguments, divided, samples
from chunkft_fx.splitting.proof import NotSeparable, Proof, Side, prove
from chunkft_fx.splitting.relations import SAME, Split, Summed
from chunkft_fx.splitting.told import Compute, tell, teller


class SplitOwner(SessionOwner, Protocol):
    """What splitting needs of a training: calls of the traced model, of all of a batch and of a part of so many."""

    def call_whole(self, arguments: Arguments) -> Any: ...

    def call_part(self, shape: tuple[int, int], arguments: Arguments) -> Any: ...


class _Ended(BaseException):
    """Ends a call where its graph would run, and nothing else."""


@dataclass(frozen=True)
class Part:
    """The graph of a part, and what reads its sizes."""

    traced: Traced
    reader: SizeReader


@dataclass(frozen=True)
class _Way:
    """How parts run that were proven: in which session, and what they are told."""

    whole: Session
    part: Part
    sizes: tuple[Any, ...]
    proof: Proof
    session: Session
    compute: Compute


class BatchSplits:
    """The splits of one training's batches: what was found for which calls, and the call that runs now, if any is."""

    def __init__(self) -> None:
        self._ways: list[_Way] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self.is_running = False
        self._whole: tuple[Session, tuple[Any, ...]] | None = None
        self._gathered: list[tuple[Part, tuple[Any, ...]]] = []
        self._error: BudgetInfeasible | None = None
        self._outputs: tuple[Any, ...] | None = None

    def run(self, owner: SplitOwner, arguments: Arguments) -> Any:
        """Make a training call, in parts if it fits only so.

        Raises `BudgetInfeasible`, before anything changes, if it does not fit so either, or must not be split.
        """
        self.is_running = True
        try:
            with contextlib.suppress(_Ended):
                return owner.call_whole(arguments)
            self._outputs = self._in_parts(owner, arguments)
            return owner.call_whole(arguments)
        finally:
            self.is_running = False
            self._whole = self._error = self._outputs = None
            self._gathered = []

    def met(self, owner: SplitOwner, session: Session, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call does where the graph of the whole batch would run; returns the flat outputs."""
        if self._outputs is not None:
            assert self._whole is not None
            first, given = self._whole
            is_same = session is first or computes_the_same(session.capture, first.capture)
            if not is_same or not all(map(is_same_input, inputs, given)):
                raise UnsupportedGraph(
                    "the batch was split, and the call that returns its outputs is traced as another graph, because "
                    "the model's forward depends on Python state that a call changes; raise the budget until the whole "
                    "batch fits"
                )
            return tuple(self._outputs)
        self._whole = session, inputs
        if _key(owner, session, inputs) not in self._known:
            try:
                return session(*inputs)
            except BudgetInfeasible as error:
                self._error = error
        raise _Ended

    def met_part(self, part: Part, inputs: tuple[Any, ...]) -> None:
        """What a call does where the graph of a part would run."""
        self._gathered.append((part, inputs))
        raise _Ended

    def _in_parts(self, owner: SplitOwner, arguments: Arguments) -> tuple[Any, ...]:
        """The flat outputs of the whole batch, from the fewest parts that fit."""
        assert self._whole is not None
        whole, inputs = self._whole
        key, error = _key(owner, whole, inputs), self._error
        known = self._known.pop(key, None)
        if known is not None:
            with contextlib.suppress(NotSeparable, BudgetInfeasible):
                found = self._of(owner, whole, inputs, arguments, known)
                self._known[key] = known
                return found
        try:
            if error is None:
                return whole(*inputs)
        except BudgetInfeasible as refused:
            error = refused
        assert error is not None
        return self._fewest(owner, arguments, key, [error])

    def _fewest(
        self, owner: SplitOwner, arguments: Arguments, key: tuple[Any, ...], errors: list[BudgetInfeasible]
    ) -> tuple[Any, ...]:
        """The same, by trying; ``errors`` has that of the whole batch."""
        assert self._whole is not None
        (whole, inputs), size, refused = self._whole, samples(arguments), "it is not split into micro-batches, because"
        if size == 1:
            raise _told(errors, f"{refused} it holds one sample")
        if whole.programs.inputs:
            raise _told(errors, f"{refused} an input requires a gradient; detach() it")
        for parts in (n for n in range(2, size + 1) if size % n == 0):
            try:
                found = self._of(owner, whole, inputs, arguments, parts)
            except NotSeparable as reason:
                raise _told(errors, f"{refused} {reason}") from None
            except BudgetInfeasible as error:
                errors.append(error)
                continue
            self._known[key] = parts
            return found
        raise _told(errors, f"{size} micro-batches of one sample do not fit either")

    def _of(
        self, owner: SplitOwner, whole: Session, inputs: tuple[Any, ...], arguments: Arguments, parts: int
    ) -> tuple[Any, ...]:
        shares = divided(arguments, parts)
        self._gathered = []
        for share in shares.calls:
            try:
                owner.call_part((parts, samples(arguments) // parts), share)
            except _Ended:
                continue
            except UnsupportedGraph as error:
                raise NotSeparable(f"a part of it cannot be traced by itself: {str(error).splitlines()[0]}") from None
        part = self._gathered[0][0]
        if any(p is not part for p, _ in self._gathered):
            raise NotSeparable("its parts are traced as different graphs")
        given = [i for _, i in self._gathered]
        relations = shares.relations(inputs, given)
        way = self._way(owner, whole, part, inputs, given[0], parts, relations)
        told = way.compute(inputs)
        outputs = way.session.accumulated([(*i, *told) for i in given])
        return whole.returned(inputs, _joined(whole, way.proof, outputs))

    def _way(
        self,
        owner: SplitOwner,
        whole: Session,
        part: Part,
        inputs: Sequence[Any],
        given: Sequence[Any],
        parts: int,
        relations: tuple[Any, ...],
    ) -> _Way:
        """How parts of these sizes run; proven once."""
        sizes = whole.plans.sizes(inputs), part.reader.read(given)
        shape = (*sizes, parts, relations)
        for way in self._ways:
            if way.whole is whole and way.part is part and way.sizes == shape:
                return way
        capture = part.traced.capture
        proof = prove(Side(whole.capture, sizes[0]), Side(capture, sizes[1]), parts, relations)
        alike = (w for w in self._ways if w.whole is whole and w.part is part and w.proof == proof)
        known = next(alike, None)
        if known is None:
            session, compute = _session(owner, part.traced, proof), teller(whole.capture, proof)
            owner.sessions.append(session)
        else:
            session, compute = known.session, known.compute
        self._ways.append(_Way(whole, part, shape, proof, session, compute))
        return self._ways[-1]


def new_part(owner: SessionOwner, gm: fx.GraphModule, inputs: Sequence[Any]) -> Part:
    """The graph of a part, as Dynamo traced it."""
    found = traced(owner, gm, inputs, is_training=True)
    return Part(found, size_reader(found.capture.graph, found.capture.primals))


def _session(owner: SessionOwner, part: Traced, proof: Proof) -> Session:
    capture = part.capture
    by_name = {n.name: n for n in capture.graph.nodes}
    pairs = zip(capture.outputs, proof.outputs, strict=True)
    joined = tuple(by_name[o].meta["val"] for o, relation in pairs if isinstance(relation, Split))
    changed = tell(capture, proof)
    told = range(len(capture.primals), len(changed.primals))
    return session_of(owner, Traced(changed, (*part.batch, *told)), True, joined)


def _joined(whole: Session, proof: Proof, parts: list[tuple[Any, ...]]) -> list[Any]:
    """The flat outputs of the whole batch, made of those of its parts, which are let go one by one."""
    left = [list(outputs) for outputs in parts]
    parts.clear()
    joined: list[Any] = []
    for i, (output, relation) in enumerate(zip(whole.capture.outputs, proof.outputs, strict=True)):
        values = [outputs[i] for outputs in left]
        for outputs in left:
            outputs[i] = None
        if not isinstance(output, OutputName):
            joined.append(output)
        elif isinstance(relation, Split):
            joined.append(torch.cat(values, relation.dim))
        elif isinstance(relation, Summed):
            joined.append(_sum(values, relation))
        else:
            assert relation == SAME or relation is None
            joined.append(values[0])
    return joined


def _sum(values: list[Tensor], relation: Summed) -> Tensor:
    dtype = values[0].dtype
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = torch.stack(values).sum(0, dtype=wide)
    return (total if relation.factor == 1 else total * float(relation.factor)).to(dtype)


def _key(owner: SplitOwner, session: Session, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What a split was found for: the graph of the whole batch, its sizes, and the optimizer that a plan is for."""
    states: StateSpec = spec_of(owner.optimizer)
    return session, states, tuple(tuple(t.shape) if isinstance(t, Tensor) else t for t in inputs)


def _told(errors: Sequence[BudgetInfeasible], why: str) -> BudgetInfeasible:
    """The error of the whole batch with what is to say of its parts, and the smallest budget that any of them needs."""
    smallest = min(errors, key=lambda error: error.smallest_budget_bytes)
    enough = smallest.smallest_budget_bytes
    more = "" if smallest is errors[0] else f"; with a budget of {enough} bytes it is split and fits"
    return BudgetInfeasible(f"{errors[0]}; {why}{more}", enough, smallest.terms)
