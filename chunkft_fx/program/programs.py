"""The programs of one capture: which one a step on a chunk runs, and which one it would run.

Each is made from what is asked once, when it is first asked for. `session.Session` runs them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from chunkft_fx.capture.capture import Capture
from chunkft_fx.capture.outline import Outline
from chunkft_fx.copies.residency import Residency
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.machine.kernel_choice import chooser
from chunkft_fx.passes.program.insert_streams import InsertStreams
from chunkft_fx.passes.program.schedule_states import ScheduleStates
from chunkft_fx.plan.plan import Chunk, Plan, Slice
from chunkft_fx.plan.state_policy import policy_of
from chunkft_fx.planning.planner import Options
from chunkft_fx.predict.step_time import Saving, StepTimes
from chunkft_fx.program.instructions import Executable, assemble, exchanged
from chunkft_fx.program.program import ProgramSpec, build, choose_variants
from chunkft_fx.program.variants import Specializer, Variant


class Owner(Protocol):
    """What a session needs of the compiled module: which chunk is active, its slices, and all that plans depend on.

    ``known_plan`` is the plan that is gone by, if there is one; ``is_bound`` says that another cut into chunks would
    lose something. ``plain`` is the wrapped model.
    """

    @property
    def chunk(self) -> int: ...

    @property
    def residency(self) -> Residency: ...

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def plain(self) -> nn.Module: ...

    @property
    def options(self) -> Options: ...

    @property
    def known_plan(self) -> Plan | None: ...

    @property
    def is_bound(self) -> bool: ...

    @property
    def is_planning(self) -> bool: ...

    @property
    def gradient_nbytes(self) -> int: ...

    def active_slices(self) -> tuple[ActiveSlice, ...]: ...

    def came_through(self) -> None: ...

    def adopt(self, plan: Plan) -> None: ...


class Programs:
    """All programs of one capture. ``expected`` names the tangents that backward is expected to bring."""

    def __init__(self, owner: Owner, capture: Capture, outline: Outline) -> None:
        self._owner = weakref.ref(owner)
        self.capture = capture
        self.outline = outline
        self.specializer = Specializer(chooser(owner.residency.device))
        self.executables: dict[tuple[Any, ...], Executable] = {}
        self.last: Executable | None = None
        self.head_split = 1
        self.times: StepTimes | None = None  # what regions take, where that is known
        self.expected = self._first_guess()
        self.written: dict[Hashable, Executable] = {}  # programs that predictions were made from
        self._inputs = tuple(
            i for i, p in enumerate(capture.primals) if p in capture.gradients and p not in capture.parameters
        )

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

    @functools.cached_property
    def uses(self) -> list[frozenset[str]]:
        """For each region the names of the parameters that it reads."""
        names = self.capture.parameters
        return [frozenset(names[p] for p in region.primals if p in names) for region in self.outline.regions]

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
        policy = policy_of(self.owner.residency.stage_owner())
        if not policy.travels:
            return None
        nbytes = sum(p.numel() // s.size * s.length * policy.nbytes(p.dtype) for p, s in named)
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

    def evaluation(self) -> Executable:
        """The program without gradients."""
        return self._executable((), frozenset(), 0)

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
        looks = absent, replace(saving, head_split=1), tuple(v.interface for v in variants)
        if looks not in known:
            known[looks] = self._written(spec, variants)
        return exchanged(known[looks], variants)
