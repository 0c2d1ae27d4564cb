"""Runs one captured graph of a model, with everything made from it, once a step.

Dynamo makes a session for each set of modes and shapes it has to tell apart (training, evaluation,
static and dynamic lengths). A session takes the program of the active chunk (`program.programs`), runs it
as one autograd function, and gives the gradients to the active slices.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft_fx.capture.capture import OutputName
from chunkft_fx.copies.engines import Engines
from chunkft_fx.copies.states.stage import Updates
from chunkft_fx.errors import DoubleBackward, UnsupportedGraph
from chunkft_fx.gradients.reduction import Reduction, agreed
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.gradients.used import drop_used
from chunkft_fx.graph import ops
from chunkft_fx.head.missing_logits import MissingLogits
from chunkft_fx.machine.memory_limit import explained
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import Policy
from chunkft_fx.planning.batch_plan import BatchPlans
from chunkft_fx.planning.example_batch import PlanMade
from chunkft_fx.predict.step_memory import storages_nbytes
from chunkft_fx.program.instructions import Executable, StreamNode
from chunkft_fx.program.program import own_inputs
from chunkft_fx.program.programs import Programs
from chunkft_fx.runtime import random_state
from chunkft_fx.runtime.expected import first_guess
from chunkft_fx.runtime.late_updates import LateUpdates
from chunkft_fx.runtime.lower_ahead import lowered_beside
from chunkft_fx.runtime.step import Machine, Step, run_backward, run_forward
from chunkft_fx.runtime.taking import TakingOwner, run_taking, takes_gradients
from chunkft_fx.torch_internals import accumulates, as_traced, is_in_forward_mode, keeps_graph, version
from chunkft_fx.torch_sizes import hint


class Owner(TakingOwner, Protocol):
    """What a session needs of the compiled module: which chunk is active, its slices, and what plans need.

    ``is_planning`` says that a call only has a plan made, ``standing`` what all ranks have to have in common when they
    run a backward together.
    """

    @property
    def engines(self) -> Engines: ...

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def late(self) -> LateUpdates: ...

    @property
    def is_planning(self) -> bool: ...

    def standing(self) -> str: ...

    def active_slices(self) -> tuple[ActiveSlice, ...]: ...

    def chunk_under(self, plan: Plan) -> int | None: ...


class Session:
    """The programs of one capture, run for whatever chunk is active.

    ``batch`` are the positions of the arguments that are neither weights nor buffers. A session that does not
    ``train`` by itself saves nothing for backward: should one come, it runs the forward again, and trains from then on.
    The session of a part of a batch that is split says what is ``joined`` afterwards (see `BatchPlans`).
    """

    def __init__(
        self,
        owner: Owner,
        programs: Programs,
        batch: Sequence[int] = (),
        trains: bool = True,
        joined: tuple[Tensor, ...] | None = None,
    ) -> None:
        self._owner = weakref.ref(owner)
        self.programs, self.capture = programs, programs.capture
        self.trains = trains
        self._anchor = torch.zeros((), requires_grad=True)
        self._parameters = [
            (i, self.capture.parameters[p]) for i, p in enumerate(self.capture.primals) if p in self.capture.parameters
        ]
        self._constants = list(self.capture.constants.values())
        self._expected = first_guess(self.capture)
        self._pending: list[weakref.ref[Step]] = []
        held = storages_nbytes(self._constants)
        self.plans = BatchPlans(lambda: self.owner, programs, batch, held, self._lowering, joined)

    @property
    def owner(self) -> Owner:
        """The compiled module, held weakly: Dynamo keeps sessions with the plain model, which may outlive it."""
        owner = self._owner()
        assert owner is not None, "a session is only called through its owner, and a pending backward holds it"
        return owner

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Run the model on the captured graph's flat inputs; returns its flat outputs."""
        with as_traced():
            return self._called([arguments])[0]

    def accumulated(self, batches: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Run several micro-batches in one step, with gradients enabled; returns the flat outputs of each.

        Raises `UnsupportedGraph`, before anything ran, for a model that cannot run region by region.
        """
        if self.programs.inputs:
            raise UnsupportedGraph(
                "an input of accumulate requires a gradient, and only parameters get theirs from several micro-batches "
                "at once; detach() the input, or run the micro-batches one after the other, inside no_sync() up to the "
                "last"
            )
        for position in (self.capture.primals.index(primal) for primal, _ in self.capture.mutations):
            if any(arguments[position] is not batches[0][position] for arguments in batches):
                raise UnsupportedGraph(
                    "the model writes into its inputs, which several micro-batches at once cannot do; clone() the "
                    "input in the model's forward, or run the micro-batches one after the other"
                )
        if not self.capture.tangents:
            return [self(*arguments) for arguments in batches]
        with as_traced():
            return self._called(batches)

    def _called(self, batches: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        if self.owner.is_planning:
            self.plans.prepare(batches, self._expected)
            raise PlanMade
        if not torch.is_grad_enabled() or not self.capture.tangents:
            (arguments,) = batches
            outputs, mutated, _ = self._evaluated(arguments)
            self._write_back(arguments, mutated)
        else:
            if is_in_forward_mode():
                raise UnsupportedGraph(
                    "tangents of forward-mode differentiation (torch.autograd.forward_ad) do not go through a compiled "
                    "module while gradients are enabled; call the plain model (torch 2.13 and older: or this one under "
                    "torch.no_grad())"
                )
            if self.trains:  # before slices are asked for, which a plan can change
                with explained(self.plans.needed):
                    self.plans.prepare(batches, self._expected)
            differentiable = [batches[0][i] for i in self.programs.inputs]
            asked = self._asked()
            trained = [s.parameter for s in asked]
            outputs = list(_StepFunction.apply(self, batches, asked, self._anchor, *differentiable, *trained))
        each = len(self.capture.outputs)
        return [self.returned(arguments, outputs[n * each : (n + 1) * each]) for n, arguments in enumerate(batches)]

    def returned(self, arguments: tuple[Any, ...], outputs: list[Any]) -> tuple[Any, ...]:
        """What a call with these arguments returns, where the graph gave these outputs."""
        for i, o in enumerate(self.capture.outputs):
            # an output that is an input is the caller's own object, as in the plain model
            if isinstance(o, OutputName) and str(o) in self.capture.primals:
                outputs[i] = arguments[self.capture.primals.index(str(o))]
            elif o is None:  # the rewrite of the head took it out (`head.rewrite`)
                outputs[i] = MissingLogits()
        return tuple(outputs)

    def _forward(self, executable: Executable, batches: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Tensor], Any]:
        """Run forward; an input that each micro-batch has for itself is there once for each, side by side."""
        own = own_inputs(self.capture)
        values = [v[i] for i, p in enumerate(self.capture.primals) for v in (batches if p in own else batches[:1])]
        return run_forward(executable, [*values, *self._constants], self._machine())

    def _machine(self, updates: Updates | None = None, reduction: Reduction | None = None) -> Machine:
        owner, optimizer = self.owner, self.owner.optimizer
        ring = owner.engines.ring(owner.residency, self.programs.uses)
        stage = None if optimizer is None else optimizer.stage
        late = self._await_updates if owner.late.is_under_way else None
        saved = owner.engines.saved
        return Machine(self.programs.backend, self.capture.fake_mode, ring, saved, stage, updates, late, reduction)

    def _await_updates(self, region: int) -> None:
        self.owner.late.wait(self.programs.uses[region])

    def _private(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, with a copy of each buffer that forward writes: backward must see its old value.

        A weight that is not on the device is taken from where it is.
        """
        written = {self.capture.primals.index(p) for p, _ in self.capture.mutations}
        values = [a.clone() if i in written else a for i, a in enumerate(arguments)]
        away = self.owner.residency.away()
        for i, name in self._parameters:
            if name in away:
                values[i] = self.owner.residency.real(name)
        return values

    def _versions(self, values: Sequence[Any], slots: dict[int, Any]) -> list[tuple[Tensor, int]]:
        """What backward reads, each with its version; a parameter stands for its weight in host memory."""
        parameters = self.owner.residency.parameters
        counted = {id(values[i]): parameters[name] for i, name in self._parameters}
        tensors = [counted.get(id(v), v) for v in slots.values() if isinstance(v, Tensor)]
        return [(t, version(t)) for t in tensors]

    def _write_back(self, arguments: Sequence[Any], mutated: Sequence[Tensor]) -> None:
        for (primal, _), value in zip(self.capture.mutations, mutated, strict=True):
            arguments[self.capture.primals.index(primal)].copy_(value)

    def begin(self, batches: Sequence[Sequence[Any]], expected: frozenset[str]) -> tuple[list[Any], list[Tensor], Step]:
        """Run forward for the active chunk; the step is what backward needs, given the expected tangents.

        ``batches`` are the arguments of each micro-batch; their outputs follow one another.

        Raises `BudgetInfeasible`, before anything ran, for a batch that no plan fits.
        """
        policy = self._placed(self.plans.prepare(batches, expected))
        policy = self._now(policy)
        self.owner.take_ring()
        owner = self.owner.active_slices()
        absent = frozenset(self.capture.tangents) - expected
        executable = self.programs.executable(tuple(s.slice for s in owner), absent, policy)
        device = self.owner.residency.device
        draws = random_state.taken(device) if self.capture.is_random else None
        # weights and written buffers are read from the first alone
        values = [self._private(batches[0]), *batches[1:]]
        outputs, mutated, slots = self._forward(executable, values)
        versions = self._versions(values[0], slots)

        def replay(wanted: frozenset[str]) -> Step:
            with random_state.restored(draws, device), torch.no_grad():
                return self.begin(values, wanted)[2]

        shapes = [(o.shape, o.dtype, o.device) if isinstance(o, Tensor) else None for o in outputs]
        step = Step(executable, slots, owner, versions, replay, expected, shapes, policy.ranks > 1)
        self._pending = [*self._still_pending(), weakref.ref(step)]
        return outputs, mutated, step

    def _placed(self, policy: Policy) -> Policy:
        """A policy with the weights that have to be fetched now: also those that someone moved off the device."""
        residency = self.owner.residency
        return replace(policy, streamed=residency.away(), depth=residency.depth)

    def _lowering(self, plan: Plan, expected: frozenset[str]) -> AbstractContextManager[None]:
        """Lowers, while inside, what the first step under a plan will run, as far as its chunk is known."""
        owner, programs = self.owner, self.programs
        chunk = owner.chunk_under(plan)
        if programs.backend == "eager" or owner.is_planning or chunk is None:
            return nullcontext()
        absent = frozenset(self.capture.tangents) - expected
        variants = programs.variants(plan.chunks[chunk].slices, absent, plan.policy)
        return lowered_beside(variants, programs.backend, self.capture.fake_mode, owner.residency.device)

    def _evaluation(self) -> Executable:
        return self.programs.evaluation(self._placed(Policy()))

    def _asked(self) -> tuple[ActiveSlice, ...]:
        """The slices that autograd is to ask for: those that are active, none before there is a plan."""
        known = self.owner.known_plan
        return () if known is None or self._now(known.policy).takes_gradients else self.owner.active_slices()

    def _now(self, policy: Policy) -> Policy:
        """What a policy is for a forward that runs now: one that only accumulates has gradients wait for an update."""
        if not self.owner.is_accumulating:
            return policy
        if not policy.in_backward:
            return replace(policy, ranks=1)
        return replace(policy, ranks=1, in_backward=False, host_gradients=self.owner.waiting is not None)

    def start(self, batches: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Tensor], Step]:
        """Run forward with gradients enabled; returns the outputs, new values of buffers, and what backward needs."""
        if self.trains or len(batches) > 1:
            return self.begin(batches, self._expected)
        (arguments,) = batches
        draws = random_state.taken(self.owner.residency.device) if self.capture.is_random else None
        values = self._private(arguments)
        outputs, mutated, _ = self._evaluated(values)
        versions = self._versions(values, dict(enumerate(values)))

        def replay(wanted: frozenset[str]) -> Step:
            with random_state.restored(draws, self.owner.residency.device), torch.no_grad():
                step = self.begin([values], wanted)[2]
            self.trains = True
            return step

        step = Step(self._evaluation(), {}, (), versions, replay, frozenset(), [])
        self._pending = [*self._still_pending(), weakref.ref(step)]
        return outputs, mutated, step

    def _evaluated(self, arguments: Sequence[Any]) -> tuple[list[Any], list[Tensor], Any]:
        self.plans.check_evaluation(arguments)
        with explained(self.plans.needed):
            return self._forward(self._evaluation(), [self._private(arguments)])

    @property
    def has_pending(self) -> bool:
        """Whether a forward is held whose backward may still come."""
        return bool(self._still_pending())

    def _opened(self, step: Step, present: frozenset[str]) -> Step:
        """The step of a forward that nothing was saved of, run again as one to train on.

        Raises `StaleBackward` where it would not be the same, and `BudgetInfeasible` where it does not fit.
        """
        step.check(step.owner)
        slots, step.slots = step.slots, None
        try:
            opened = step.replay(present)
        except BaseException:
            step.slots = slots
            raise
        step.slots = slots if keeps_graph() else None
        return opened

    def _still_pending(self) -> list[weakref.ref[Step]]:
        return [ref for ref in self._pending if (step := ref()) is not None and step.slots is not None]

    def finish(
        self, step: Step, gradients: Sequence[Mapping[str, Tensor]], asked: Sequence[ActiveSlice]
    ) -> list[Tensor | None]:
        """Run backward with the tangents that came, those of each micro-batch by name.

        Returns the gradients of the inputs that are no parameters, then those of the slices that autograd asks for, as
        it is to give them to the parameters. Slices that were not known at the forward get theirs here.
        """
        self.owner.late.finish()
        present = frozenset(name for came in gradients for name in came)
        if not step.owner:
            step = self._opened(step, present)
        step.check(self.owner.active_slices())
        if not present <= step.provided:
            # Saved for fewer gradients than came: run the forward again for exactly these.
            if not keeps_graph():
                step.let_go()  # no plan has room for both
            step = step.replay(present)
        self._expected = present
        provided = [(name, n) for name in self.capture.tangents if name in step.provided for n in range(len(gradients))]
        by_name = {n.name: n for n in self.capture.graph.find_nodes(op="placeholder")}
        tangents = {}
        for (name, n), slot in zip(provided, step.executable.tangents, strict=True):
            output = self.capture.tangents[name] + n * len(self.capture.outputs)
            came, like = gradients[n].get(name), by_name[name].meta["val"]
            tangents[slot] = step.zeros(output) if came is None else _restride(came, like)
        totals, missing = self._backward(step, tangents)
        active = {s.name: s for s in step.owner}
        handed = {name: active[name].handed(mean) for name, mean in missing.items()}
        for p in [p for p in totals if p in self.capture.parameters]:
            name = self.capture.parameters[p]
            handed[name] = active[name].handed(totals.pop(p))
        given = [totals.get(self.capture.primals[i]) for i in self.programs.inputs]
        given += [handed.pop(s.name, None) if s is active.get(s.name) else None for s in asked]
        if handed:
            with self.owner.residency.presented():
                for name, gradient in handed.items():
                    active[name].add(gradient)
        return given

    def _agreed(self, executable: Executable) -> list[str] | None:
        """What other ranks have a gradient of, and this one has not; see `gradients.reduction.agreed`."""
        calls = [i.call for i in executable.backward if isinstance(i.call, StreamNode)]
        own = [name for call in calls if call.target is ops.reduce for name in call.names]
        pieces = [(call.number, call.names) for call in calls if call.target in ops.TAKERS]
        return agreed(self.owner.ranks, own, pieces, self.owner.standing())

    def _backward(self, step: Step, tangents: dict[int, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run a step's backward; the gradients that it leaves to autograd, by primal, and those of parameters that only
        other ranks have, by name."""
        for s in step.owner:
            drop_used(s.parameter)
        others = self._agreed(step.executable) if step.is_reduced else None
        if takes_gradients(step.executable):
            return run_taking(self.owner, step, tangents, self._machine, accumulates(self._anchor)), {}
        reduction = Reduction(self.owner.ranks, {s.name: s for s in step.owner}, self.owner.residency.device, others)
        totals = run_backward(step, tangents, self._machine(reduction=reduction))
        with self.owner.residency.presented():
            missing = reduction.finish()
        self.owner.came_through()
        return totals, missing


class _StepFunction(torch.autograd.Function):
    """One step as one autograd node; the anchor makes autograd call backward.

    Of the parameters only those with an active slice are inputs: the gradient that goes to each is its slice's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        session: Session,
        batches: Sequence[Sequence[Any]],
        asked: Sequence[ActiveSlice],
        anchor: Tensor,
        *inputs: Tensor,
    ) -> tuple[Any, ...]:
        with explained(session.plans.needed):
            outputs, mutated, step = session.start(batches)
        session._write_back(batches[0], mutated)
        ctx.session, ctx.step, ctx.owner, ctx.asked = session, step, session.owner, asked
        each, with_gradient = len(session.capture.outputs), set(session.capture.tangents.values())
        ctx.mark_non_differentiable(
            *(o for i, o in enumerate(outputs) if isinstance(o, Tensor) and i % each not in with_gradient)
        )
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackward(
                "backward was called with create_graph=True, but the backward pass of a compiled module cannot be "
                "differentiated twice (double backward), as a gradient penalty asks for; leave create_graph=True out, "
                "or take the penalty's gradients through the plain model"
            )
        session: Session = ctx.session
        each, tangents = len(session.capture.outputs), session.capture.tangents
        parts = [gradients[first : first + each] for first in range(0, len(gradients), each)]
        came = [{name: g for name, i in tangents.items() if (g := part[i]) is not None} for part in parts]
        with ctx.owner.lock, ctx.owner.ranks.failing(), explained(session.plans.needed), as_traced():
            return (None, None, None, None, *session.finish(ctx.step, came, ctx.asked))


def _restride(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient laid out in the dimension order that the graph was traced with."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-hint(strides[d]), d))
    inverse = [order.index(d) for d in range(like.ndim)]
    return gradient.to(like.dtype).permute(order).contiguous().permute(inverse)
