"""Runs the training of one model: its plan, the active chunk, and the captures that its calls go through.

A compiled module (`module.module`) is what its user sees of this; sessions, the gradient gate and the optimizer ask it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from chunkft_fx.capture.tracing import trace
from chunkft_fx.copies.engines import Engines
from chunkft_fx.copies.residency import Residency
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.copies.waiting_gradients import WaitingGradients
from chunkft_fx.errors import NotPlanned
from chunkft_fx.following import ownership
from chunkft_fx.following.distribution import refuse_sharded
from chunkft_fx.following.following import Following, ModelOptimizer
from chunkft_fx.following.model_watch import ModelWatch
from chunkft_fx.following.moves import gradients_aside
from chunkft_fx.gradients.gate import Arrivals, GradientGate
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.gradients.used import UsedGradient
from chunkft_fx.gradients.waiting import WaitingGradient
from chunkft_fx.machine.rates import ALONE, RankLink, Rates
from chunkft_fx.module.micro_batches import MicroBatches, micro_batches
from chunkft_fx.module.sessions import new_session
from chunkft_fx.module.splits import BatchSplits, Part, new_part
from chunkft_fx.plan import schedule as schedules
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.schedule import ChunkSchedule
from chunkft_fx.plan.state_spec import require_whole
from chunkft_fx.planning.example_batch import arguments_of, plan_for_example
from chunkft_fx.planning.planner import Options, first_plan
from chunkft_fx.program.instructions import Executable
from chunkft_fx.program.programs import Programs
from chunkft_fx.ranks.models import same_model
from chunkft_fx.ranks.ranks import ranks_of
from chunkft_fx.runtime.late_updates import LateUpdates
from chunkft_fx.runtime.session import Session
from chunkft_fx.splitting.arguments import Arguments
from chunkft_fx.torch_internals import start_workers


class Training(Following):
    """One model in training. Calls from several threads come one after another (``lock``)."""

    sessions: list[Session]
    _schedule: ChunkSchedule | None
    _calls: dict[bool, Callable[..., Any]]
    _part_calls: dict[tuple[int, int], Callable[..., Any]]
    _splits: BatchSplits
    _unseen: contextlib.ExitStack
    _micro_batches: MicroBatches | None
    _coverage: str | None

    def __init__(
        self, model: nn.Module, options: Options, backend: str, plan: Plan | None, device: torch.device
    ) -> None:
        self.ranks = ranks_of(device)
        link = RankLink(self.ranks.size, self.ranks.nbytes_per_s(device))
        self.model, self.options, self.backend = model, replace(options, link=link), backend
        self._meet_ranks(device)
        self.lock, self.arrivals, self.late = threading.RLock(), Arrivals(), LateUpdates()
        self._plan, self._slices, self._optimizer, self._position = None, None, None, None
        self._advanced = self._is_due = self._is_planning = self._gave_up = self._is_accumulating = False
        self._sweep, self._micro_batches, self._coverage = 0, None, None
        self._watch, self._gate = ModelWatch(model), GradientGate(self)
        self._take_up(plan, device)
        weakref.finalize(self, self._gate.close)

    def _meet_ranks(self, device: torch.device) -> None:
        """Begin with the same model on all ranks, once they know that they were given the same kind of model."""
        if self.ranks.is_alone:
            return
        refuse_sharded(self.model)
        self.ranks.require_same("options", self.options.described(), "give compile the same options on all ranks")
        same_model(self.ranks, self.model, device)

    def standing(self) -> str:
        """What all ranks have to have in common when they run a backward together: place in the sweep, and rates."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        rates = [g["lr"] for g in groups if not isinstance(g["lr"], Tensor)]
        return f"chunk {self.chunk} of sweep {self.schedule.sweep}, learning rates {rates}"

    def _take_up(self, plan: Plan | None, device: torch.device) -> None:
        """Begin with the model as it is now: nothing is captured, and of the plan only what the user gave is there."""
        model = self.model
        refuse_sharded(model)
        ownership.claim(model.parameters(), self)
        self._drop_gradients()
        self._plan, self.sessions, self._slices, self._schedule = plan, [], None, None
        tier = HostTier(device)
        self.residency, self.engines = Residency(model, device, tier), Engines(device, tier)
        for module in model.modules():
            module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})
        # Two backends, so that neither ever runs what was captured for the other; the plain model keeps them alive.
        ours = weakref.ref(self)
        self._calls = {f: trace(model, functools.partial(_backend, ours, f)) for f in (True, False)}
        self._part_calls, self._splits = {}, BatchSplits()
        self._look()
        self._gate.guard(self._watch.parameters)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model compiled, with the arguments of its forward."""
        with self.lock, self.ranks.failing(), self.late.during_call():
            self.check()
            if not self.sessions and self.backend == "inductor" and self.compute_device.type == "cuda":
                start_workers()
            if not (self.model.training and torch.is_grad_enabled()):
                self.late.finish()
                return self._through(self._calls[False], (args, kwargs))
            self._plan_ahead(args, kwargs)
            if self._micro_batches is not None:
                return self.call_whole((args, kwargs))
            return self._called(*args, **kwargs)

    def call_whole(self, arguments: Arguments) -> Any:
        """Call the model as it is traced for training."""
        return self._through(self._calls[True], arguments)

    def call_part(self, shape: tuple[int, int], arguments: Arguments) -> Any:
        """Call the model as it is traced for a part of a batch: of how many, and how large.

        Each such shape is traced by itself: Dynamo would take sizes that change for ones that vary.
        """
        if shape not in self._part_calls:
            ours = weakref.ref(self)
            self._part_calls[shape] = trace(self.model, functools.partial(_part_backend, ours))
        return self._through(self._part_calls[shape], arguments)

    def _through(self, call: Callable[..., Any], arguments: Arguments) -> Any:
        args, kwargs = arguments
        with self.residency.presented(), self._gradients_unseen():
            return call(*args, **kwargs)

    def plan_elsewhere(self, batch: Any, rates: Rates, link: RankLink = ALONE) -> None:
        """Have the plan made for a batch as on a machine of these rates, one of the ranks that ``link`` joins.

        Nothing runs, and no weight is read.
        """
        self.options = replace(self.options, batch=batch, rates=rates, link=link)
        args, kwargs = arguments_of(batch)
        with self.lock:
            self._plan_ahead(args, kwargs)

    @contextlib.contextmanager
    def _gradients_unseen(self) -> Iterator[None]:
        """While inside, until a session is called: Dynamo traces no parameter with a gradient of its own kind."""
        held = ((p, p.grad) for p in self._watch.parameters.values())
        own = [
            p
            for p, g in held
            if g is not None and (g.dtype != p.dtype or isinstance(g, WaitingGradient | UsedGradient))
        ]
        with contextlib.ExitStack() as unseen:
            unseen.enter_context(gradients_aside(own))
            self._unseen = unseen
            yield

    def accumulate(self, batches: Sequence[Any]) -> list[Any]:
        """Run micro-batches as one step, each region over all of them before the next; returns the outputs of each."""
        calls = micro_batches(batches)
        with self.lock, self.late.during_call(), self.residency.presented():
            if len(calls) == 1 or not torch.is_grad_enabled():
                return [self.run(*args, **kwargs) for args, kwargs in calls]
            self._micro_batches = MicroBatches()
            try:
                return self._micro_batches.run(self.run, calls)
            finally:
                self._micro_batches = None

    def run_session(self, session: Session, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self._unseen.close()
        if self._micro_batches is not None and not self._is_planning:
            return self._micro_batches.met(session, arguments)
        return self._splits.met(self, session, arguments) if self._splits.is_running else session(*arguments)

    def run_part(self, part: Part, arguments: tuple[Any, ...]) -> None:
        self._unseen.close()
        self._splits.met_part(part, arguments)

    def _plan_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first training call, have the plan made for the largest batch that was given to compile."""
        if self.options.batch is None or (self._plan is not None and self._plan.batch):
            return
        self._is_planning = True
        try:
            plan_for_example(self._called, self.options.batch, args, kwargs, self.residency.device)
        finally:
            self._is_planning = False

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        with self.residency.presented():
            return self._splits.run(self, (args, kwargs))

    @property
    def plan(self) -> Plan:
        """The plan. With ``chunks="auto"`` it exists from the first training batch on, else `NotPlanned`."""
        if self._plan is None:
            raise NotPlanned(
                'with chunks="auto" the plan depends on the batch; call the model once on a training batch, '
                "or give chunks a number"
            )
        return self._plan

    @property
    def compute_device(self) -> torch.device:
        """Where the model runs, and gradients are; streamed weights lie in host memory beside it."""
        return self.residency.device

    @property
    def schedule(self) -> ChunkSchedule:
        """Where in the sweep training is."""
        schedule = self._schedule
        if schedule is None:
            schedule = self._new_schedule(self.plan)
            if self._position is not None:
                schedule.load_state_dict(self._position, self.options.interval == "auto")
            schedules.warn_of_short_turns(schedule)
            self._schedule = schedule
        return schedule

    def _new_schedule(self, plan: Plan) -> ChunkSchedule:
        """A plan's schedule at the start of a sweep."""
        schedule = ChunkSchedule(
            len(plan.chunks),
            plan.order,
            plan.interval,
            plan.seed,
            cuts=schedules.cuts_digest(plan.chunks),
            warms_up=plan.warms_up,
        )
        if self._position is None:
            schedule.sweep = self._sweep
        return schedule

    @property
    def chunk(self) -> int:
        """The index of the active chunk."""
        return self.schedule.chunk

    def chunk_under(self, plan: Plan) -> int | None:
        """The chunk that is active once a plan is gone by; None where a saved position is still to be read."""
        if self._plan is not None and plan.chunks is self._plan.chunks:
            return self.chunk
        return self._new_schedule(plan).chunk if self._position is None else None

    def activate(self, chunk: int) -> None:
        """Make a chunk active; gradients of the chunk that was active are dropped if it is another one."""
        before = self.chunk
        self.schedule.activate(chunk)
        if chunk != before:
            self._leave_chunk()

    def advance(self, takes_turn: bool = True) -> bool:
        """Count one optimizer step; moves to the next chunk when due, and says whether it did.

        A step that takes no turn leaves the schedule where it is.
        """
        self._advanced, self.arrivals = True, Arrivals()
        changed = takes_turn and self.schedule.advance()
        if changed:
            self._leave_chunk()
        return changed

    def _leave_chunk(self) -> None:
        self._drop_gradients()
        self._slices = None

    def refuse_partial_step(self) -> None:
        """Raise `PartialStep` if the optimizer left a step halfway."""
        if self.optimizer is not None:
            self.optimizer.refuse_partial_step()

    def expect(self, optimizer: ModelOptimizer) -> None:
        """Make this the module's optimizer, in place of one that was made before; it is held weakly.

        Programs say when what its stage announced may come in (``admit``), and it takes the stage's memory when a plan
        is made. One that needs whole parameters has chunks cut anew, between them. Raises `OptimizerMismatch` if that
        comes too late, `ChunkCountError` if there are too few parameters.
        """
        known = self._plan
        parts = [s for c in known.chunks for s in c.slices if not s.is_whole] if known is not None else []
        is_recut = optimizer.spec.is_whole and bool(parts)
        if is_recut and self.is_bound:
            require_whole(parts, optimizer.spec)
        if is_recut:
            first_plan(self.model, self.options, optimizer.spec)  # raises before anything changes
        self._optimizer = weakref.ref(optimizer)
        if is_recut:
            self._begin_anew(self.residency.device)
        self.ranks.require_same("the optimizer", repr(optimizer.spec), "make the same optimizer on all ranks")

    def resume(self, position: Mapping[str, Any]) -> None:
        """Continue at a schedule position saved by ``schedule.state_dict()``; without a plan, as soon as there is one.

        Gradients stay if the active chunk does. A position saved with another number of chunks has no meaning here and
        changes nothing, with a `ChunkFTWarning`. Raises `CheckpointMismatch` when it is not such a position, or would
        mean something else here: without a plan the order, seed and a given interval are compared now, the cuts and an
        interval of "auto" at the batch that makes the plan.
        """
        before = None if self._plan is None else self.chunk
        if self._plan is None:
            schedules.check_position(position)
            options = self.options
            known = {"order": options.order, "seed": options.seed}
            known |= {} if options.interval == "auto" else {"interval": options.interval}
            schedules.require_same_meaning(position, known)
        else:
            self.schedule.load_state_dict(position, self.options.interval == "auto")
            if self.options.coverage == "auto":
                schedules.warn_of_other_coverage(position, self._plan.coverage)
        self._position = dict(position)
        if before is None or self.chunk != before:
            self._leave_chunk()

    def schedule_position(self) -> dict[str, Any] | None:
        """The schedule's position for checkpoints; without a plan the one to resume at, None if there is none."""
        return self._position if self._plan is None else self.schedule.state_dict()

    def active_slices(self) -> tuple[ActiveSlice, ...]:
        """The active slices with their gradients: the same objects until the active chunk changes."""
        slices = self._slices
        if slices is None:
            chosen = self.plan.chunks[self.chunk].slices
            slices = tuple(ActiveSlice(s, self._watch.parameters[s.name]) for s in chosen)
            self._slices = slices
        return slices

    def active_slice(self, name: str) -> ActiveSlice | None:
        """The active slice of a parameter, None where it has none or no chunk is known yet."""
        return None if self._plan is None else next((s for s in self.active_slices() if s.name == name), None)

    def came_through(self, updated: bool = False) -> None:
        """A backward of this module ran, and updated weights itself or not."""
        self.arrivals.through = True
        self.arrivals.updated |= updated

    @property
    def is_accumulating(self) -> bool:
        """Whether backward passes only add to gradients now."""
        return self._is_accumulating

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """While inside, backward passes add to gradients, and update no weights themselves."""
        before, self._is_accumulating = self._is_accumulating, True
        try:
            yield
        finally:
            self._is_accumulating = before

    @property
    def waiting(self) -> WaitingGradients | None:
        """The gradients that wait in host memory; None where the plan has them on the device.

        Where the backward updates weights, those of passes that only accumulate wait there, moved by the ring of
        states, which has nothing else to do in such a pass.
        """
        return self._waiting_gradients()

    def take_ring(self) -> None:
        """Take the device memory that gradients pass through to host memory, if any do, unless it is taken."""
        if self._plan is not None and self._plan.policy.host_gradients:
            self._waiting_gradients()

    def _waiting_gradients(self) -> WaitingGradients | None:
        known, optimizer = self._plan, self.optimizer
        if known is None or not known.policy.takes_gradients:
            return None
        updates = optimizer.updates if optimizer is not None and known.policy.in_backward else None
        if known.policy.in_backward and updates is None:
            return None
        others = 0 if optimizer is None else optimizer.untaken_nbytes
        ring = None if updates is None else updates.ring
        return self.engines.waiting(known.policy.pieces, self._watch.parameters, others, ring, self.late.finish)

    def follow_updates(self) -> None:
        """Put work that follows on the current stream behind the updates of the step before, which may still run."""
        self.late.finish()

    def hooked(self) -> str | None:
        """A parameter on whose gradient the user has a hook; None if there is none."""
        return self._gate.hooked()

    def frozen(self) -> str | None:
        """A parameter that was trained when the model was last looked at, and requires no gradient any more."""
        changes = self._watch.changes()
        return next(iter(changes.frozen), None) if changes is not None else None

    def came_to_parameter(self) -> None:
        """Autograd gave one of the parameters a gradient."""
        self.arrivals.outside = True

    @property
    def last_programs(self) -> Programs:
        """The programs of the latest capture that ran one; `NotPlanned` before the first call."""
        found = next((s.programs for s in reversed(self.sessions) if s.programs.last is not None), None)
        if found is None:
            raise NotPlanned("there is no program yet; call the model once on a batch")
        return found

    @property
    def last_executable(self) -> Executable:
        """The program that ran last, or was built last, as it runs."""
        last = self.last_programs.last
        assert last is not None, "programs without one are not the latest"
        return last

    @property
    def plain(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    @property
    def is_planning(self) -> bool:
        """Whether a call only has a plan made."""
        return self._is_planning

    @property
    def known_plan(self) -> Plan | None:
        """The plan, as far as there is one."""
        return self._plan

    @property
    def gradient_nbytes(self) -> int:
        """Bytes of the gradients that active slices hold on the device."""
        return sum(g.nbytes for g in self._gradients() if not isinstance(g, WaitingGradient))

    def _gradients(self) -> list[Tensor]:
        return [s.grad for s in self._slices or () if s.grad is not None]

    @property
    def is_bound(self) -> bool:
        """Whether another cut into chunks would lose a position, states or gradients, or a backward that may come."""
        if self.has_begun or self._position is not None:
            return True
        if not self.ranks.is_alone and self._plan is not None and self._plan.batch:
            return True  # other ranks are cut like this one
        if self._schedule is not None and not (self._schedule.is_at_start and self._schedule.sweep == self._sweep):
            return True
        return bool(self._gradients()) or any(session.has_pending for session in self.sessions)

    @property
    def begun_coverage(self) -> str | None:
        """What steps of this training cover, "one" chunk or "all" parameters; None while that can still be chosen."""
        if self._plan is not None and self._plan.batch:
            return self._plan.coverage if self.is_bound else None
        if self.has_begun and self._coverage is not None:
            return self._coverage
        if self._position is None:
            return None
        return "one" if self._position["chunks"] > 1 else "all"

    def adopt(self, plan: Plan) -> None:
        """Go by this plan from now on; with other chunks than before, from the first one."""
        self._coverage = plan.coverage
        if self._plan is None or plan.chunks is not self._plan.chunks:
            self._leave_chunk()
            self._schedule = None
        self._plan = plan

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by name, tied ones once."""
        return self.model.named_parameters()


def _backend(
    training: weakref.ref[Training], is_training: bool, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Dynamo's backend: a session of a training, which is alive while its model is called compiled."""
    owner = training()
    assert owner is not None
    session = new_session(owner, gm, inputs, is_training)
    owner.sessions.append(session)

    def run(*arguments: Any) -> tuple[Any, ...]:
        called = training()
        assert called is not None
        return called.run_session(session, arguments)

    return run


def _part_backend(training: weakref.ref[Training], gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dynamo's backend for parts of a batch, whose graphs run in sessions that `BatchSplits` makes."""
    owner = training()
    assert owner is not None
    part = new_part(owner, gm, inputs)

    def run(*arguments: Any) -> None:
        called = training()
        assert called is not None
        called.run_part(part, arguments)

    return run
