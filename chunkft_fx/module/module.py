"""The module that `chunkft_fx.compile` returns: the model's place-taker, with a chunk active at a time."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.capture.aliases import separate_outputs
from chunkft_fx.capture.blocks import block_paths, locate, warn_if_unseen
from chunkft_fx.capture.capture import capture
from chunkft_fx.capture.outline import Template, outline
from chunkft_fx.capture.tracing import trace
from chunkft_fx.copies.host_memory import HostMemory
from chunkft_fx.copies.residency import Residency
from chunkft_fx.errors import NotPlanned
from chunkft_fx.gradients.gate import GradientGate
from chunkft_fx.gradients.slices import ActiveSlice, Arrivals, ChunkSchedule
from chunkft_fx.head.rewrite import chunk_head
from chunkft_fx.machine.kernel_choice import chooser
from chunkft_fx.module import ownership
from chunkft_fx.module.distribution import refuse_sharded
from chunkft_fx.module.following import Following, ModelOptimizer
from chunkft_fx.module.model_watch import ModelWatch
from chunkft_fx.module.moves import gradients_aside
from chunkft_fx.module.routing import through_compiled
from chunkft_fx.plan import position as positions
from chunkft_fx.plan.plan import Plan
from chunkft_fx.planning.example_batch import plan_for_example
from chunkft_fx.planning.planner import Options, first_plan
from chunkft_fx.predict.step_memory import Moment, step_timeline
from chunkft_fx.program.instructions import Executable
from chunkft_fx.program.program import Program
from chunkft_fx.program.programs import Programs
from chunkft_fx.program.variants import Variant
from chunkft_fx.runtime.session import Session


class CompiledModule(Following):
    """A model whose backward fills only the active chunk's slices; everything else is the wrapped model's.

    It can be used in the model's place (`module.stand_in`), follows changes of the model where it can and refuses the
    others by name (`module.following`). Calls from several threads come one after another.
    """

    _backend: str
    _sessions: list[Session]
    _schedule: ChunkSchedule | None
    _calls: dict[bool, Callable[..., Any]]
    _is_planning: bool
    _unseen: contextlib.ExitStack

    def __init__(
        self, model: nn.Module, options: Options, backend: str, plan: Plan | None, device: torch.device
    ) -> None:
        ours = weakref.ref(self)

        def run(*args: Any, **kwargs: Any) -> Any:
            module = ours()
            assert module is not None, "a bound forward keeps its module alive"
            return module._run(args, kwargs)

        super().__init__(model, run)
        own = self.__dict__
        own["_options"], own["_backend"], own["_plan"] = options, backend, None
        own["_slices"], own["_optimizer"], own["lock"], own["arrivals"] = None, None, threading.RLock(), Arrivals()
        own["_advanced"], own["_is_due"], own["_is_planning"], own["_gave_up"] = False, False, False, False
        own["_position"], own["_sweep"] = None, 0
        own["_watch"], own["_gate"] = ModelWatch(model), GradientGate(self)
        self._take_up(plan, device)
        weakref.finalize(self, self._gate.close)

    def _take_up(self, plan: Plan | None, device: torch.device) -> None:
        """Begin with the model as it is now: nothing is captured, and of the plan only what the user gave is there."""
        own, model = self.__dict__, self._model
        refuse_sharded(model)
        ownership.claim(model.parameters(), self)
        self._drop_gradients()
        own["_plan"], own["_sessions"], own["_slices"], own["_schedule"] = plan, [], None, None
        own["_residency"] = Residency(model, device, HostMemory())
        own["_residency"].optimizer = self._optimizer
        for module in model.modules():
            module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})
        # Two backends, so that neither ever runs what was captured for the other; the plain model keeps them alive.
        ours = weakref.ref(self)
        own["_calls"] = {f: trace(model, functools.partial(_new_session, ours, f)) for f in (True, False)}
        self._look()
        self._gate.guard(self._watch.parameters)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.lock:
            self.check()
            is_training = self._model.training and torch.is_grad_enabled()
            with self._residency.presented(), self._gradients_unseen():
                if is_training:
                    self._plan_ahead(self._calls[True], args, kwargs)
                return self._calls[is_training](*args, **kwargs)

    @contextlib.contextmanager
    def _gradients_unseen(self) -> Iterator[None]:
        """While inside, until a session is called: Dynamo traces no parameter that has a wider gradient."""
        wide = [p for p in self._watch.parameters.values() if p.grad is not None and p.grad.dtype != p.dtype]
        with contextlib.ExitStack() as unseen:
            unseen.enter_context(gradients_aside(wide))
            self.__dict__["_unseen"] = unseen
            yield

    def _run_session(self, session: Session, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self._unseen.close()
        return session(*arguments)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name != "generate":
            return value
        return through_compiled(value, self._model, self.forward, self._residency, self.lock)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Copies and pickles carry the wrapped model, the options and hooks; the copy is traced and planned anew."""
        return _rebuild, (self._model, self._options, self._backend, self._residency.device), self.call_hooks

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
        return self._residency.device

    @property
    def residency(self) -> Residency:
        """Where each weight lives."""
        return self._residency

    @property
    def schedule(self) -> ChunkSchedule:
        """Where in the sweep training is."""
        schedule = self._schedule
        if schedule is None:
            plan = self.plan
            cuts = positions.cuts_digest(plan.chunks)
            schedule = ChunkSchedule(len(plan.chunks), plan.order, plan.interval, plan.seed, cuts=cuts)
            if self._position is not None:
                schedule.load_state_dict(self._position)
            elif self._sweep:
                schedule.sweep = self._sweep
            self.__dict__["_schedule"] = schedule
        return schedule

    @property
    def chunk(self) -> int:
        """The index of the active chunk."""
        return self.schedule.chunk

    def activate(self, chunk: int) -> None:
        """Make a chunk active; gradients of the chunk that was active are dropped if it is another one."""
        before = self.chunk
        self.schedule.activate(chunk)
        if chunk != before:
            self._leave_chunk()

    def advance(self) -> bool:
        """Count one optimizer step; moves to the next chunk when due, and says whether it did."""
        self.__dict__["_advanced"], self.__dict__["arrivals"] = True, Arrivals()
        changed = self.schedule.advance()
        if changed:
            self._leave_chunk()
        return changed

    def _leave_chunk(self) -> None:
        self._drop_gradients()
        self.__dict__["_slices"] = None

    def expect(self, optimizer: ModelOptimizer) -> None:
        """Make this the module's optimizer, in place of one that was made before; it is held weakly.

        Programs say when what its stage announced may come in (``admit``), and it takes the stage's memory when a plan
        is made.
        """
        self.__dict__["_optimizer"] = self._residency.optimizer = weakref.ref(optimizer)

    def resume(self, position: Mapping[str, Any]) -> None:
        """Continue at a schedule position saved by ``schedule.state_dict()``; without a plan, as soon as there is one.

        A position saved with another number of chunks has no meaning here and changes nothing, with a
        `ChunkFTWarning`. Raises `CheckpointMismatch` when it is not such a position, or would mean something else here:
        without a plan the order, seed and interval are compared now, the cuts at the batch that makes the plan.
        """
        if self._plan is None:
            positions.check(position)
            options = self._options
            known = {"order": options.order, "seed": options.seed, "interval": options.interval}
            positions.require_same(position, known)
        else:
            self.schedule.load_state_dict(position)
        self.__dict__["_position"] = dict(position)
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
            self.__dict__["_slices"] = slices
        return slices

    def active_slice(self, name: str) -> ActiveSlice | None:
        """The active slice of a parameter, None where it has none or no chunk is known yet."""
        return None if self._plan is None else next((s for s in self.active_slices() if s.name == name), None)

    def came_through(self) -> None:
        """A backward of this module ran."""
        self.arrivals.through = True

    def came_to_parameter(self) -> None:
        """Autograd gave one of the parameters a gradient."""
        self.arrivals.outside = True

    @property
    def program(self) -> Program:
        """The program that ran last (or was built last); `NotPlanned` before the first call."""
        return self._last().program

    @property
    def timeline(self) -> tuple[Moment, ...]:
        """What its step is predicted to hold, moment by moment, beside weights, states and gradients held before."""
        return step_timeline(self._last(), self._backend)

    @property
    def programs(self) -> Programs:
        """The programs of the latest capture, for tools; `NotPlanned` before the first call."""
        self._last()
        return self._sessions[-1].programs

    def _last(self) -> Executable:
        last = next((s.programs.last for s in reversed(self._sessions) if s.programs.last is not None), None)
        if last is None:
            raise NotPlanned("there is no program yet; call the model once on a batch")
        return last

    @property
    def templates(self) -> tuple[Template, ...]:
        """The distinct region graphs of the latest capture."""
        if not self._sessions:
            raise NotPlanned("the model has not been traced yet; call it once on a batch")
        return self._sessions[-1].programs.outline.templates

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant made so far, over all captures."""
        return tuple(v for session in self._sessions for v in session.programs.specializer.variants)

    def _new_session(self, gm: fx.GraphModule, inputs: Sequence[Any], is_training: bool) -> Session:
        if is_training and not self._options.return_logits:
            chunk_head(gm)
        separate_outputs(gm)
        names = {id(p): name for name, p in self._watch.parameters.items()}
        captured = capture(gm, inputs, names, self._backend)
        modules = list(self._model.named_modules())
        locate(captured.graph, modules)
        regions = outline(captured, block_paths(modules))
        if captured.tangents and not any(s.capture.tangents for s in self._sessions):  # once a model
            warn_if_unseen(modules, captured.parameters.values(), [r.label for r in regions.regions])
        held = {t.untyped_storage().data_ptr() for t in (*self._model.parameters(), *self._model.buffers())}
        batch = [i for i, t in enumerate(inputs) if isinstance(t, Tensor) and id(t) not in names and _is_apart(t, held)]
        device, options = self._residency.device, self._options
        parameters = {n: torch.empty_like(p, device="meta") for n, p in self._residency.parameters.items()}
        choose, own = chooser(device), (options.passes, options.program_passes)
        programs = Programs(captured, regions, parameters, self._backend, device, choose, *own)
        session = Session(self, programs, batch, is_training)
        self._sessions.append(session)
        return session

    def _plan_ahead(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first training call, have the plan made for the largest batch that was given to compile."""
        if self._options.batch is None or (self._plan is not None and self._plan.batch):
            return
        self.__dict__["_is_planning"] = True
        try:
            plan_for_example(call, self._options.batch, args, kwargs, self._residency.device)
        finally:
            self.__dict__["_is_planning"] = False

    @property
    def is_planning(self) -> bool:
        """Whether a call only has a plan made."""
        return self._is_planning

    @property
    def plain(self) -> nn.Module:
        """The wrapped model."""
        return self._model

    @property
    def options(self) -> Options:
        """What was asked of `compile`."""
        return self._options

    @property
    def known_plan(self) -> Plan | None:
        """The plan, as far as there is one."""
        return self._plan

    @property
    def gradient_nbytes(self) -> int:
        """Bytes of the gradients that active slices hold."""
        return sum(s.grad.nbytes for s in self._slices or () if s.grad is not None)

    @property
    def is_bound(self) -> bool:
        """Whether another cut into chunks would lose a position, states or gradients, or a backward that may come."""
        if self.has_begun or self._position is not None:
            return True
        if self._schedule is not None and not (self._schedule.is_at_start and self._schedule.sweep == self._sweep):
            return True
        return self.gradient_nbytes > 0 or any(session.has_pending for session in self._sessions)

    def adopt(self, plan: Plan) -> None:
        """Go by this plan from now on; with other chunks than before, from the first one."""
        if self._plan is None or plan.chunks is not self._plan.chunks:
            self._leave_chunk()
            self.__dict__["_schedule"] = None
        self.__dict__["_plan"] = plan

    def extra_repr(self) -> str:
        planned = f"{len(self._plan.chunks)} chunks" if self._plan is not None else "not planned yet"
        return f"budget={format_bytes(self._options.budget_bytes)}, {planned}"


def _is_apart(t: Tensor, held: set[int]) -> bool:
    """Whether a tensor has memory of its own, beside what a model holds."""
    return t.layout is not torch.strided or t.untyped_storage().data_ptr() not in held


def _new_session(
    module: weakref.ref[CompiledModule], is_training: bool, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Dynamo's backend: a session of a module, which is alive while it is called."""
    owner = module()
    assert owner is not None
    session = owner._new_session(gm, inputs, is_training)

    def run(*arguments: Any) -> tuple[Any, ...]:
        called = module()
        assert called is not None
        return called._run_session(session, arguments)

    return run


def _rebuild(model: nn.Module, options: Options, backend: str, device: torch.device) -> CompiledModule:
    return CompiledModule(model, options, backend, first_plan(model, options), device)
