"""A session: one captured graph of a model, with everything made from it, called once a step.

Dynamo makes a session for each set of modes and shapes it has to tell apart (training, evaluation,
static and dynamic lengths). A session picks the program of the active chunk, runs it as one autograd
function, and gives the gradients to the active slices.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft_fx.capture import Capture, OutputName
from chunkft_fx.errors import DoubleBackward
from chunkft_fx.executable import Executable, assemble, exchanged
from chunkft_fx.fixed_memory import state_nbytes
from chunkft_fx.kernel_choice import chooser
from chunkft_fx.memory_limit import explained
from chunkft_fx.missing_logits import MissingLogits
from chunkft_fx.outline import Outline
from chunkft_fx.passes.insert_streams import InsertStreams
from chunkft_fx.passes.schedule_states import ScheduleStates
from chunkft_fx.plan import Chunk, Slice
from chunkft_fx.program import ProgramSpec, build, choose_variants
from chunkft_fx.residency import Residency
from chunkft_fx.runtime import Machine, Step, run_backward, run_forward
from chunkft_fx.slices import ActiveSlice
from chunkft_fx.specialize import Specializer, Variant
from chunkft_fx.step_cost import Saving, StepTimes
from chunkft_fx.step_memory import storages_nbytes
from chunkft_fx.torch_internals import hint, version


class Owner(Protocol):
    """What a session needs of the compiled module: which chunk is active, and its slices."""

    @property
    def chunk(self) -> int: ...

    @property
    def residency(self) -> Residency: ...

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def active_slices(self) -> tuple[ActiveSlice, ...]: ...

    def came_through(self) -> None: ...


class Session:
    """Programs of one capture, run for whatever chunk is active."""

    def __init__(self, owner: Owner, capture: Capture, outline: Outline, backend: str, batch_nbytes: int = 0) -> None:
        self._owner = weakref.ref(owner)
        self.capture = capture
        self.outline = outline
        self.backend = backend
        self.specializer = Specializer(chooser(owner.residency.device))
        self.executables: dict[tuple[Any, ...], Executable] = {}
        self.last: Executable | None = None
        self.save_from: tuple[int, ...] = ()
        self.offload_below: tuple[int, ...] = ()
        self.head_split = 1
        self.times: StepTimes | None = None  # what regions take, where that is known
        self.expected = self._first_guess()
        self._anchor = torch.zeros((), requires_grad=True)
        self._inputs = tuple(
            i for i, p in enumerate(capture.primals) if p in capture.gradients and p not in capture.parameters
        )
        self._parameters = [
            (i, capture.parameters[p]) for i, p in enumerate(capture.primals) if p in capture.parameters
        ]
        self._constants = list(capture.constants.values())
        self.given = {"batch and constants": batch_nbytes + storages_nbytes(self._constants)}

    @property
    def owner(self) -> Owner:
        """The compiled module, held weakly: Dynamo keeps sessions with the plain model, which may outlive it."""
        owner = self._owner()
        assert owner is not None, "a session is only called through its owner, and a pending backward holds it"
        return owner

    def _first_guess(self) -> frozenset[str]:
        """Tangents expected in backward: the scalar outputs' (a loss) if there are any, else all."""
        tangents = {
            n.name: n for n in self.capture.graph.find_nodes(op="placeholder") if n.name in self.capture.tangents
        }
        scalars = frozenset(name for name, node in tangents.items() if node.meta["val"].ndim == 0)
        return scalars or frozenset(tangents)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Run the model on the captured graph's flat inputs; returns its flat outputs."""
        if not torch.is_grad_enabled() or not self.capture.tangents:
            outputs, mutated, _ = self._forward(self._executable((), frozenset(), 0), self._private(arguments))
            self._write_back(arguments, mutated)
        else:
            differentiable = [arguments[i] for i in self._inputs]
            trained = [s.parameter for s in self.owner.active_slices()]
            outputs = list(_StepFunction.apply(self, arguments, self._anchor, *differentiable, *trained))
        for i, o in enumerate(self.capture.outputs):
            # an output that is an input is the caller's own object, as in the plain model
            if isinstance(o, OutputName) and str(o) in self.capture.primals:
                outputs[i] = arguments[self.capture.primals.index(str(o))]
            elif o is None:  # the rewrite of the head took it out (`head_rewrite`)
                outputs[i] = MissingLogits()
        return tuple(outputs)

    def executable(
        self, slices: Sequence[ActiveSlice], absent: frozenset[str], save_from: int, offload_below: int = 0
    ) -> Executable:
        """The program of a chunk, assembled; cached by what it depends on."""
        return self._executable(tuple(s.slice for s in slices), absent, save_from, offload_below)

    def _executable(
        self, slices: tuple[Any, ...], absent: frozenset[str], save_from: int, offload_below: int = 0
    ) -> Executable:
        residency = self.owner.residency
        streams = InsertStreams(residency.away(), residency.device, residency.depth)
        saving = Saving(save_from, offload_below, self.head_split)
        key = (slices, absent, saving, streams)
        if key not in self.executables:
            self.executables[key] = self._assembled(slices, absent, saving, streams)
        self.last = self.executables[key]
        return self.last

    def _assembled(
        self, slices: tuple[Any, ...], absent: frozenset[str], saving: Saving, streams: InsertStreams
    ) -> Executable:
        spec = replace(self._spec(slices, absent, saving, streams), states=self._paced(slices, saving))
        return self._written(spec, choose_variants(self.capture, self.outline, self.specializer, spec))

    def _paced(self, slices: Sequence[Slice], saving: Saving) -> ScheduleStates | None:
        if self.times is None:
            return None
        parameters = self.owner.residency.parameters
        named = [(parameters[s.name], s) for s in slices]
        nbytes = sum(p.numel() // s.size * s.length * state_nbytes(p.dtype) for p, s in named)
        return ScheduleStates(self.times, saving.save_from, nbytes)

    def _spec(
        self, slices: tuple[Any, ...], absent: frozenset[str], saving: Saving, streams: InsertStreams
    ) -> ProgramSpec:
        inputs = frozenset(self.capture.primals[i] for i in self._inputs) if slices else frozenset()
        by_name = {s.name: s for s in slices}
        return ProgramSpec(
            by_name, absent, inputs, saving.save_from, streams, saving.offload_below, head_split=saving.head_split
        )

    def _written(self, spec: ProgramSpec, variants: list[Variant]) -> Executable:
        program = build(self.capture, self.outline, spec, variants)
        return assemble(program, len(self.capture.primals) + len(self.capture.constants))

    def _forward(self, executable: Executable, values: Sequence[Any]) -> tuple[list[Any], list[Tensor], Any]:
        return run_forward(executable, [*values, *self._constants], self._machine())

    def _machine(self) -> Machine:
        residency = self.owner.residency
        ring, stage = residency.ring(self.uses), residency.stage()
        return Machine(self.backend, self.capture.fake_mode, ring, residency.saved, stage)

    @functools.cached_property
    def uses(self) -> list[frozenset[str]]:
        """For each region the names of the parameters that it reads."""
        names = self.capture.parameters
        return [frozenset(names[p] for p in region.primals if p in names) for region in self.outline.regions]

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

    def begin(self, arguments: Sequence[Any], expected: frozenset[str]) -> tuple[list[Any], list[Tensor], Step]:
        """Run forward for the active chunk; the step is what backward needs, given the expected tangents."""
        owner = self.owner.active_slices()
        absent = frozenset(self.capture.tangents) - expected
        chunk = self.owner.chunk
        offload_below = self.offload_below[chunk] if self.offload_below else 0
        executable = self.executable(owner, absent, self.save_from[chunk], offload_below)
        draws = _random_state() if self.capture.is_random else None
        values = self._private(arguments)
        outputs, mutated, slots = self._forward(executable, values)
        versions = self._versions(values, slots)

        def replay(wanted: frozenset[str]) -> Step:
            with _restored(draws), torch.no_grad():
                return self.begin(values, wanted)[2]

        shapes = [(o.shape, o.dtype, o.device) if isinstance(o, Tensor) else None for o in outputs]
        return outputs, mutated, Step(executable, slots, owner, versions, replay, expected, shapes)

    def finish(self, step: Step, gradients: dict[str, Tensor]) -> list[Tensor | None]:
        """Run backward with the tangents that came.

        Returns the gradients of the inputs that are no parameters, then those of the active slices, as autograd is to
        give them to the parameters.
        """
        step.check(self.owner.active_slices())
        present = frozenset(gradients)
        if not present <= step.provided:
            # Saved for fewer gradients than came: run the forward again for exactly these.
            step = step.replay(present)
        self.expected = present
        names = [n for n in self.capture.tangents if n in step.provided]
        by_name = {n.name: n for n in self.capture.graph.find_nodes(op="placeholder")}
        tangents = {}
        for name, slot in zip(names, step.executable.tangents, strict=True):
            like = by_name[name].meta["val"]
            tangents[slot] = (
                _restride(gradients[name], like) if name in gradients else step.zeros(self.capture.tangents[name])
            )
        totals = run_backward(step, tangents, self._machine())
        self.owner.came_through()
        active = {s.name: s for s in step.owner}
        handed: dict[str, Tensor] = {}
        for p in [p for p in totals if p in self.capture.parameters]:
            name = self.capture.parameters[p]
            handed[name] = active[name].handed(totals.pop(p))
        given = [totals.get(self.capture.primals[i]) for i in self._inputs]
        return given + [handed.get(s.name) for s in step.owner]

    def planned(self, chunk: Chunk, saving: Saving, known: dict[Hashable, Executable] | None = None) -> Executable:
        """What would run for a chunk under a saving policy if all weights were resident.

        With ``known``, which collects them, programs that would look the same are written once, for the first chunk
        asked for: the result then has the other's graph and starts, but the variants of this one (`exchanged`).
        """
        absent = frozenset(self.capture.tangents) - self.expected
        residency = self.owner.residency
        resident = InsertStreams(frozenset(), residency.device, residency.depth)
        spec = self._spec(chunk.slices, absent, saving, resident)
        variants = choose_variants(self.capture, self.outline, self.specializer, spec)
        if known is None:
            return self._written(spec, variants)
        looks = replace(saving, head_split=1), tuple(v.interface for v in variants)
        if looks not in known:
            known[looks] = self._written(spec, variants)
        return exchanged(known[looks], variants)


class _StepFunction(torch.autograd.Function):
    """One step as one autograd node; the anchor makes autograd call backward.

    Of the parameters only those with an active slice are inputs: the gradient that goes to each is its slice's.
    """

    @staticmethod
    def forward(
        ctx: Any, session: Session, arguments: Sequence[Any], anchor: Tensor, *inputs: Tensor
    ) -> tuple[Any, ...]:
        with explained():
            outputs, mutated, step = session.begin(arguments, session.expected)
        session._write_back(arguments, mutated)
        ctx.session, ctx.step, ctx.owner = session, step, session.owner
        with_gradient = set(session.capture.tangents.values())
        ctx.mark_non_differentiable(
            *(o for i, o in enumerate(outputs) if isinstance(o, Tensor) and i not in with_gradient)
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
        came = {name: g for name, i in session.capture.tangents.items() if (g := gradients[i]) is not None}
        with ctx.owner.lock, explained():
            return (None, None, None, *session.finish(ctx.step, came))


def _restride(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient laid out in the dimension order that the graph was traced with."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-hint(strides[d]), d))
    inverse = [order.index(d) for d in range(like.ndim)]
    return gradient.to(like.dtype).permute(order).contiguous().permute(inverse)


def _random_state() -> list[tuple[Any, Tensor]]:
    states: list[tuple[Any, Tensor]] = [(torch.random, torch.random.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append((torch.cuda, torch.cuda.get_rng_state()))
    return states


@contextlib.contextmanager
def _restored(states: list[tuple[Any, Tensor]] | None) -> Any:
    """Run with earlier random states, and put the present ones back afterwards."""
    if states is None:
        yield
        return
    now = _random_state()
    for module, state in states:
        module.set_rng_state(state)
    try:
        yield
    finally:
        for module, state in now:
            module.set_rng_state(state)
