"""The public entry point: ``compile`` and the module it returns."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from chunkft_fx.blocks import block_paths
from chunkft_fx.budget import format_bytes, parse_bytes
from chunkft_fx.capture import capture, trace
from chunkft_fx.errors import AlreadyCompiled, NotPlanned, OptionError
from chunkft_fx.example_batch import arguments_of, plan_for_example
from chunkft_fx.executable import Executable
from chunkft_fx.head_rewrite import chunk_head
from chunkft_fx.host_memory import HostMemory
from chunkft_fx.outline import Template, outline
from chunkft_fx.plan import Plan
from chunkft_fx.planner import Options, first_plan, parameter_specs
from chunkft_fx.program import Program
from chunkft_fx.residency import Residency, compute_device
from chunkft_fx.routing import through_compiled
from chunkft_fx.session import Session
from chunkft_fx.slices import ActiveSlice, ChunkSchedule, zero_gradients
from chunkft_fx.specialize import Variant
from chunkft_fx.step_memory import Moment, step_timeline
from chunkft_fx.streaming import StageOwner
from chunkft_fx.torch_internals import is_torch_compiled

BACKENDS = ("inductor", "eager")


def compile(
    model: nn.Module,
    budget: str | int,
    *,
    chunks: int | str = "auto",
    order: str = "ascending",
    interval: int = 1,
    backend: str = "inductor",
    seed: int = 0,
    return_logits: bool = False,
    device: torch.device | str | None = None,
    batch: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
) -> CompiledModule:
    """Compile a model for full-parameter training in which one chunk of the parameters is active a step.

    ``budget`` is the device memory to stay within (``"24GB"``, ``"24GiB"`` or bytes). ``chunks`` is a
    number or ``"auto"``: on a GPU as many as make the predicted step fast, in a sweep that is not too long,
    on the CPU the fewest that fit the budget. ``order`` is how a sweep visits them (``"ascending"``, ``"descending"``,
    ``"random"`` with ``seed``), ``interval`` the optimizer steps spent on each. ``backend="eager"`` runs
    the rewritten FX graphs as they are, ``"inductor"`` compiles them. ``device`` is where the model runs,
    by default where its first parameter is; its weights can be anywhere: those that the budget cannot
    hold stay in host memory and are fetched for each use.
    ``batch`` is an example of the largest training batch, as the arguments of one call (a dict of keyword arguments, or
    a tuple): the plan is made for it at the first training call, whatever that call brings. Only shapes and dtypes
    count, so tensors on the device ``"meta"`` will do. A batch that is larger in any size than those planned for is
    planned for before it runs, with or without ``batch``; once a sweep has begun chunks and streamed weights stay.
    The model is traced at its first call; it must trace with ``torch.compile(fullgraph=True)``.
    In training, logits that only feed a cross-entropy are never held whole: the model returns ``None`` in
    their place, unless ``return_logits``. In evaluation and under ``no_grad`` it returns them.

    Raises `BudgetParseError`, `ChunkCountError`, `OptionError`, `NoTrainableParameters`, `AlreadyCompiled`;
    a call with a new kind of batch can raise `UnsupportedGraph` or `BudgetInfeasible`, and then changed nothing.
    """
    if isinstance(model, CompiledModule):
        raise AlreadyCompiled("this model was already compiled by chunkft_fx; call compile once, on the plain model")
    if is_torch_compiled(model):
        raise AlreadyCompiled("this model was already compiled by torch.compile; pass the plain model instead")
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if chunks != "auto" and (isinstance(chunks, bool) or not isinstance(chunks, int)):
        raise OptionError(f'chunks={chunks!r} is not known; give a number or "auto"')
    ChunkSchedule(1, order, interval, seed)
    if batch is not None:
        arguments_of(batch)
    options = Options(parse_bytes(budget), chunks, order, interval, seed, return_logits, batch)
    target = compute_device(model, device)
    return CompiledModule(model, options, backend, first_plan(model, options), target)


class CompiledModule(nn.Module):
    """A model whose backward fills only the active chunk's slices; everything else is the wrapped model's.

    Parameters, buffers, submodules and their names are those of the wrapped model, in whose place this
    module can be used; attributes that it does not have itself are looked up there.
    """

    # Kept in the instance dictionary: nn.Module would register the wrapped model as a child.
    _model: nn.Module
    _options: Options
    _backend: str
    _plan: Plan | None
    _sessions: list[Session]
    _slices: tuple[ActiveSlice, ...] | None
    _schedule: ChunkSchedule | None
    _position: dict[str, Any] | None
    _residency: Residency
    _is_planning: bool

    def __init__(
        self, model: nn.Module, options: Options, backend: str, plan: Plan | None, device: torch.device
    ) -> None:
        super().__init__()
        own = self.__dict__
        own["_model"], own["_options"], own["_backend"], own["_plan"] = model, options, backend, plan
        own["_sessions"], own["_slices"], own["_schedule"], own["_position"] = [], None, None, None
        own["_residency"], own["_is_planning"] = Residency(model, device, HostMemory()), False
        for module in model.modules():
            module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})
        # Two backends, so that neither ever runs what was captured for the other; the plain model keeps them alive.
        ours = weakref.ref(self)
        calls = {flag: trace(model, functools.partial(_new_session, ours, flag)) for flag in (True, False)}

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._residency.presented():
                self._plan_ahead(calls[True], args, kwargs)
                return calls[model.training and torch.is_grad_enabled()](*args, **kwargs)

        own["forward"] = functools.wraps(model.forward)(call)  # shows the model's own signature
        # The registries are shared, not copied: names, state_dict and .to() are the wrapped model's own.
        own["_parameters"], own["_buffers"], own["_modules"] = model._parameters, model._buffers, model._modules
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own["training"] = model.training

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_model")
        if model is None:
            raise AttributeError(name)
        value = getattr(model, name)
        return through_compiled(value, model, self.forward, self._residency) if name == "generate" else value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copies and pickles carry the wrapped model and the options; the copy is traced and planned anew."""
        return _rebuild, (self._model, self._options, self._backend, self._residency.device)

    def train(self, mode: bool = True) -> CompiledModule:
        """Set training mode here and in the wrapped model."""
        self._model.train(mode)
        self.__dict__["training"] = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, also the active slices', or fill them with zeros in place."""
        self._model.zero_grad(set_to_none)
        zero_gradients(self._slices or (), set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's ``state_dict``: same keys, shapes and values as the plain model's."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the wrapped model."""
        return self._model.load_state_dict(*args, **kwargs)

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
            schedule = ChunkSchedule(len(plan.chunks), plan.order, plan.interval, plan.seed)
            if self._position is not None:
                schedule.load_state_dict(self._position)
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
            self.__dict__["_slices"] = None

    def advance(self) -> bool:
        """Count one optimizer step; moves to the next chunk when due, and says whether it did."""
        changed = self.schedule.advance()
        if changed:
            self.__dict__["_slices"] = None
        return changed

    def expect(self, optimizer: StageOwner) -> None:
        """Let programs say when what this optimizer's stage announced may come in (``admit``).

        It takes the stage's memory when a plan is made. The optimizer is held weakly; a second call replaces it.
        """
        self._residency.optimizer = weakref.ref(optimizer)

    def resume(self, position: Mapping[str, Any]) -> None:
        """Continue at a schedule position saved by ``schedule.state_dict()``; without a plan, as soon as there is one.

        A position saved with another number of chunks has no meaning here and changes nothing. Raises
        `CheckpointMismatch` when it is not such a position.
        """
        ChunkSchedule(1).load_state_dict(position)
        self.__dict__["_position"] = dict(position)
        if self._schedule is not None:
            self._schedule.load_state_dict(position)
        self.__dict__["_slices"] = None

    def active_slices(self) -> tuple[ActiveSlice, ...]:
        """The active slices with their gradients: the same objects until the active chunk changes."""
        slices = self._slices
        if slices is None:
            chosen = self.plan.chunks[self.chunk].slices
            slices = tuple(ActiveSlice(s, self._model.get_parameter(s.name)) for s in chosen)
            self.__dict__["_slices"] = slices
        return slices

    @property
    def program(self) -> Program:
        """The program that ran last (or was built last); `NotPlanned` before the first call."""
        return self._last().program

    @property
    def timeline(self) -> tuple[Moment, ...]:
        """What its step is predicted to hold, moment by moment, beside weights, states and gradients held before."""
        return step_timeline(self._last(), self._backend)

    def _last(self) -> Executable:
        last = next((s.last for s in reversed(self._sessions) if s.last is not None), None)
        if last is None:
            raise NotPlanned("there is no program yet; call the model once on a batch")
        return last

    @property
    def templates(self) -> tuple[Template, ...]:
        """The distinct region graphs of the latest capture."""
        if not self._sessions:
            raise NotPlanned("the model has not been traced yet; call it once on a batch")
        return self._sessions[-1].outline.templates

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant made so far, over all captures."""
        return tuple(v for session in self._sessions for v in session.specializer.variants)

    def _new_session(self, gm: fx.GraphModule, inputs: Sequence[Any], is_training: bool) -> Session:
        if is_training and not self._options.return_logits:
            chunk_head(gm)
        names = {id(p): name for name, p in self._model.named_parameters()}
        captured = capture(gm, inputs, names, self._backend)
        blocks = block_paths(self._model.named_modules())
        held = {t.untyped_storage().data_ptr() for t in (*self._model.parameters(), *self._model.buffers())}
        batch = [
            i
            for i, t in enumerate(inputs)
            if isinstance(t, torch.Tensor) and id(t) not in names and t.untyped_storage().data_ptr() not in held
        ]
        session = Session(self, captured, outline(captured, blocks), self._backend, batch, is_training)
        self._sessions.append(session)
        return session

    def _plan_ahead(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first training call, have the plan made for the largest batch that was given to compile."""
        is_training = self._model.training and torch.is_grad_enabled()
        if not is_training or self._options.batch is None or (self._plan is not None and self._plan.batch):
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
    def has_begun(self) -> bool:
        """Whether another cut into chunks would lose a position, states or gradients, or a backward that may come."""
        schedule, optimizer = self._schedule, self._residency.stage_owner()
        if self._position is not None or (optimizer is not None and optimizer.state):
            return True
        if schedule is not None and (schedule.sweep, schedule.position, schedule.steps) != (0, 0, 0):
            return True
        return self.gradient_nbytes > 0 or any(session.has_pending for session in self._sessions)

    def adopt(self, plan: Plan) -> None:
        """Go by this plan from now on; with other chunks than before, from the first one."""
        if self._plan is None or plan.chunks is not self._plan.chunks:
            self.__dict__.update(_schedule=None, _slices=None)
        self.__dict__["_plan"] = plan

    def extra_repr(self) -> str:
        planned = f"{len(self._plan.chunks)} chunks" if self._plan is not None else "not planned yet"
        return f"budget={format_bytes(self._options.budget_bytes)}, {planned}"


def _new_session(
    module: weakref.ref[CompiledModule], is_training: bool, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Session:
    """Dynamo's backend: a session of a module, which is alive while it is called."""
    owner = module()
    assert owner is not None
    return owner._new_session(gm, inputs, is_training)


def _rebuild(model: nn.Module, options: Options, backend: str, device: torch.device) -> CompiledModule:
    parameter_specs(model)
    return CompiledModule(model, options, backend, first_plan(model, options), device)
